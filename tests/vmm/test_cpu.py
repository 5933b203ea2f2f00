"""Which processor a guest sees: what is masked, what is listed, and what is said of it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from ratoon.errors import InvalidInput, MachineDied
from ratoon.machine.vmm import cpu
from ratoon.machine.vmm.cpu import (
    EMULATED,
    LEVELS,
    MASKS,
    NATIVE,
    Settled,
    as_list,
    as_properties,
    describe,
    lacking,
    named_model,
    settle,
)


def refusing(register: int) -> MachineDied:
    """QEMU's end where a host's KVM does not let it set a register."""
    return MachineDied(
        "QEMU of a guest died at start",
        f"qemu-system-x86_64: error: failed to set MSR {register:#x} to 0xc000069\n"
        "qemu-system-x86_64: kvm.c:3849: kvm_buf_set_msrs: Assertion `ret == nmsrs' failed.",
    )


class Host:
    """Refuses these registers, one after the other, until what owns them is masked."""

    def __init__(self, registers: Mapping[int, str]) -> None:
        self._registers = registers
        self.asked: list[str] = []

    async def expand(self, model: str) -> dict[str, object]:
        self.asked.append(model)
        for register, mask in self._registers.items():
            if mask not in model.split(","):
                raise refusing(register)
        return {
            "model-id": "An Emulated, Fast Processor",
            "family": 25,
            "sse4.1": True,
            "vmx": False,
        }


LISTED = "base,family=25,model-id=An Emulated,, Fast Processor,sse4.1=on"


async def test_a_host_that_refuses_nothing() -> None:
    host = Host({})
    assert await settle(NATIVE, host.expand) == Settled(LISTED)
    assert host.asked == [NATIVE]


async def test_what_is_refused_is_masked_and_told() -> None:
    host = Host({0x10A: "-arch-capabilities", 0xDA0: "-xsaves"})
    settled = await settle(NATIVE, host.expand)
    assert settled == Settled(
        LISTED, ("arch-capabilities (MSR 0x10a refused)", "xsaves (MSR 0xda0 refused)")
    )
    assert host.asked == [
        NATIVE,
        f"{NATIVE},-arch-capabilities",
        f"{NATIVE},-arch-capabilities,-xsaves",
    ]


@pytest.mark.parametrize(
    ("register", "mask"),
    [
        (0x48, "-spec-ctrl"),
        (0xC1, "pmu=off"),
        (0xC4, "pmu=off"),
        (0xCF, "-core-capability"),
        (0xE1, "-waitpkg"),
        (0x122, "-tsx-ctrl"),
        (0x186, "pmu=off"),
        (0x345, "-pdcm"),
        (0x38D, "pmu=off"),
        (0x390, "pmu=off"),
        (0x480, "-vmx"),
        (0x491, "-vmx"),
        (0x6E1, "-pks"),
        (0xD90, "-mpx"),
        (0xC0000104, "-tsc-scale"),
        (0xC001011F, "-virt-ssbd"),
    ],
)
async def test_who_owns_a_register(register: int, mask: str) -> None:
    host = Host({register: mask})
    assert len((await settle("host", host.expand)).masked) == 1
    assert host.asked[-1] == f"host,{mask}"


async def test_a_register_that_nothing_owns_or_that_is_refused_still() -> None:
    for registers in ({0x1234: "-nothing"}, {0x10A: "-this-would-not-help"}):
        host = Host(registers)
        with pytest.raises(MachineDied, match="failed to set MSR"):
            await settle(NATIVE, host.expand)
        assert len(host.asked) <= 2


async def test_a_host_that_refuses_all_is_given_up() -> None:
    registers = {0x48: "-spec-ctrl", 0xCF: "-core-capability", 0xE1: "-waitpkg", 0x345: "-pdcm"}
    registers |= {0x10A: "-arch-capabilities", 0x122: "-tsx-ctrl", 0x6E1: "-pks", 0xD90: "-mpx"}
    host = Host(registers)
    with pytest.raises(MachineDied):
        await settle(NATIVE, host.expand)
    assert len(host.asked) == 1 + MASKS


async def test_another_death_is_no_refusal() -> None:
    async def expand(model: str) -> dict[str, object]:
        raise MachineDied("QEMU died", "Could not access KVM kernel module")

    with pytest.raises(MachineDied, match="kernel module"):
        await settle(NATIVE, expand)


# Words ------------------------------------------------------------------------------------------


def test_a_model_in_the_words_of_qmp() -> None:
    assert as_properties("host,-vmx,+arat,pmu=off") == (
        "host",
        {"vmx": False, "arat": True, "pmu": False},
    )
    name, changed = as_properties(LISTED)
    assert name == "base"
    assert changed == {"family": 25, "model-id": "An Emulated, Fast Processor", "sse4.1": True}
    assert as_list(changed) == LISTED


def test_what_is_lacking_is_named_once() -> None:
    log = """\
qemu-system-x86_64: warning: host doesn't support requested feature: CPUID.01H:ECX.pni [bit 0]
qemu-system-x86_64: warning: host doesn't support requested feature: CPUID.01H:ECX.pni [bit 0]
qemu-system-x86_64: warning: host doesn't support requested feature: CPUID.01H:ECX.sse4.1 [bit 19]
qemu-system-x86_64: warning: TCG doesn't support requested feature: CPUID.07H:EBX.avx512f [bit 16]
qemu-system-x86_64: warning: host doesn't support requested feature: MSR(10AH).rdctl-no [bit 0]
qemu-system-x86_64: warning: host doesn't support requested feature: CPUID[eax=07h].EBX.x [bit 1]
qemu-system-x86_64: Host doesn't support requested features
"""
    assert lacking(log) == ("pni", "sse4.1", "avx512f", "rdctl-no", "x")
    assert lacking("KVM internal error. Suberror: 1") == ()


def test_a_model_in_a_few_words() -> None:
    assert describe(EMULATED) == EMULATED
    assert describe("EPYC-Rome") == "EPYC-Rome"
    assert describe(LEVELS["x86-64-v3"]) == "x86-64-v3"
    assert describe(LISTED) == "An Emulated, Fast Processor (1 features)"


def test_each_level_has_what_the_one_below_has() -> None:
    low, middle, high = (set(model.split(",")[3:]) for model in LEVELS.values())
    assert low < middle < high
    assert {"+avx2", "+bmi2", "+fma"} <= middle - low


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named_model("x86-64-v3") == LEVELS["x86-64-v3"]
    assert named_model("EPYC-Rome") == "EPYC-Rome", "QEMU knows it"
    assert named_model("Skylake-Server-v5") == "Skylake-Server-v5"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x86-64-v5",
        "EPYC-Rome,-avx2",
        "host",
        "max",
        "base",
        "Available",
        "-h",
        "a\nb",
        "x" * 999,
    ],
)
def test_names_of_nothing_are_refused_with_the_way_out(name: str) -> None:
    said = "no processor .* to be had: use x86-64-v2, x86-64-v3, x86-64-v4, a name that"
    with pytest.raises(InvalidInput, match=said) as failure:
        named_model(name)
    assert len(str(failure.value)) < 400
    assert re.search("or none: it is the host's own", str(failure.value))
    assert cpu._known_names.cache_info().misses <= 1
