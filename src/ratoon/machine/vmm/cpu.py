"""The processor that a guest sees, in the words of QEMU's `-cpu`.

A device state has what the processor had. QEMU loads it into one with fewer features without a
word, and drops what that lacks: a timer that was armed is gone, and the guest hangs. So under KVM,
where the features are the host's, a snapshot's processor is the list of them all, and each start
has QEMU `enforce` it: a host that lacks one refuses, and names it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache

from ratoon.errors import HostError, InvalidInput, MachineDied
from ratoon.machine.vmm.command import BINARY

#: What a base gets under TCG, whose own default lacks x86-64-v2; `+arat` spares an idle guest its
#: ticks.
EMULATED = "max,+arat"
#: Under KVM: all that the host has but what no guest needs: less state, and less to attack.
NATIVE = "host,-vmx,-svm,pmu=off"

_V2 = "+arat,+cx16,+lahf-lm,+pni,+popcnt,+sse4.1,+sse4.2,+ssse3"
_V3 = f"{_V2},+abm,+avx,+avx2,+bmi1,+bmi2,+f16c,+fma,+movbe,+xsave"
_V4 = f"{_V3},+avx512bw,+avx512cd,+avx512dq,+avx512f,+avx512vl"
#: The levels of the x86-64 psABI, which QEMU does not know by name; the hosts of a fleet share one.
LEVELS = {
    name: f"qemu64,model-id={name},-svm,{features}"
    for name, features in (("x86-64-v2", _V2), ("x86-64-v3", _V3), ("x86-64-v4", _V4))
}
#: Not for a fleet: what these have is the host's, or nothing.
_NO_BASELINES = frozenset({"base", "host", "max"})

#: How often something may be masked: hosts refuse one register or two, a broken one all of them.
MASKS = 6
#: What owns the registers that a nested host's KVM may refuse: from QEMU's target/i386/kvm.
_OWNERS = {
    range(0x48, 0x49): "-spec-ctrl",
    range(0xC1, 0xCF): "pmu=off",
    range(0xCF, 0xD0): "-core-capability",
    range(0xE1, 0xE2): "-waitpkg",
    range(0x10A, 0x10B): "-arch-capabilities",
    range(0x122, 0x123): "-tsx-ctrl",
    range(0x186, 0x198): "pmu=off",
    range(0x345, 0x346): "-pdcm",
    range(0x38D, 0x391): "pmu=off",
    range(0x480, 0x492): "-vmx",
    range(0x6E1, 0x6E2): "-pks",
    range(0xD90, 0xD91): "-mpx",
    range(0xDA0, 0xDA1): "-xsaves",
    range(0xC0000104, 0xC0000105): "-tsc-scale",
    range(0xC001011F, 0xC0010120): "-virt-ssbd",
}
_REFUSED = re.compile(r"failed to set MSR 0x([0-9a-f]+)")
#: Such as `CPUID.01H:ECX.sse4.1 [bit 19]`, `MSR(10AH).rdctl-no [bit 0]`.
_LACKING = re.compile(r"doesn't support requested feature: (?:\S*[A-Z)]\.)?(\S+) \[bit")


@dataclass(frozen=True)
class Settled:
    """A model that KVM takes on this host, all of its features listed.

    `masked` says what had to be left out for that, and why.
    """

    model: str
    masked: tuple[str, ...] = ()


def named_model(name: str) -> str:
    """The model that a baseline's name stands for. InvalidInput: there is no such one."""
    if name in LEVELS:
        return LEVELS[name]
    if name in _NO_BASELINES or name not in _known_names():
        raise InvalidInput(
            f"no processor {name[:100]!r} to be had: use {', '.join(LEVELS)}, a name that "
            f"`{BINARY} -cpu help` lists, such as EPYC-Rome, or none: it is the host's own then"
        )
    return name


@cache
def _known_names() -> frozenset[str]:
    """The models that QEMU lists."""
    try:
        output = subprocess.run(
            [BINARY, "-cpu", "help"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise HostError(f"{BINARY} does not list its processors: {error}") from None
    listed = output.partition("\n\n")[0].splitlines()[1:]
    return frozenset(line.split()[0] for line in listed if line.strip())


async def settle(model: str, expand: Callable[[str], Awaitable[Mapping[str, object]]]) -> Settled:
    """The model with what this host's KVM refuses masked, and all that is left listed.

    `expand` starts a QEMU with a model and asks it for that list (`query-cpu-model-expansion`); it
    raises MachineDied where QEMU ends with a register that was refused. MachineDied: there is more
    than can be masked.
    """
    masked: dict[str, str] = {}
    while True:
        tried = ",".join((model, *masked))
        try:
            return Settled(as_list(await expand(tried)), tuple(masked.values()))
        except MachineDied as error:
            refused = _REFUSED.search(error.log_tail)
            if refused is None or len(masked) == MASKS:
                raise
            register = int(refused[1], 16)
            mask = next((mask for owned, mask in _OWNERS.items() if register in owned), None)
            if mask is None or mask in masked:
                raise
            masked[mask] = f"{_feature(mask)} (MSR {register:#x} refused)"


def _feature(mask: str) -> str:
    return mask.removeprefix("-").removesuffix("=off")


def as_properties(model: str) -> tuple[str, dict[str, object]]:
    """A model as QMP wants it: its name, and what is changed of it."""
    name, *words = _words(model)
    changed: dict[str, object] = {}
    for word in words:
        if word[0] in "+-":
            changed[word[1:]] = word[0] == "+"
        else:
            key, _, value = word.partition("=")
            number = int(value) if value.isdecimal() else value
            changed[key] = {"on": True, "off": False}.get(value, number)
    return name, changed


def as_list(properties: Mapping[str, object]) -> str:
    """What QMP says of a model, as one that has nothing but what is listed."""
    words = ["base"]
    for name, value in sorted(properties.items()):
        if isinstance(value, bool):
            words += [f"{name}=on"] * value
        else:
            words.append(f"{name}={str(value).replace(',', ',,')}")
    return ",".join(words)


def lacking(log: str) -> tuple[str, ...]:
    """The features that QEMU, which ended for want of them, names in its log."""
    return tuple(dict.fromkeys(_LACKING.findall(log)))


def describe(model: str) -> str:
    """A model in a few words: what it calls itself, and how many features are listed, if any."""
    name, *words = _words(model)
    called = [word.removeprefix("model-id=") for word in words if word.startswith("model-id=")]
    if not called:
        return model
    features = sum(word.endswith("=on") for word in words)
    return f"{called[0]} ({features} features)" if name == "base" else called[0]


def _words(model: str) -> list[str]:
    """Its parts; a doubled comma is one that belongs to a value."""
    return [part.replace("\0", ",") for part in model.replace(",,", "\0").split(",")]
