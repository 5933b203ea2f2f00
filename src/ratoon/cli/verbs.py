"""All verbs by subject: the module that has each, and what it does in a line.

So the program starts, and shows its help, without what only one of them needs.
"""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    """`module` is below `ratoon.cli`; `help` is the first line of the verb's own."""

    module: str
    help: str


SUBJECTS: dict[str, dict[str, Verb]] = {
    "Sandboxes": {
        "run": Verb(
            "run", "Run a command in a fork of a snapshot or an image; end with its exit code."
        ),
        "exec": Verb("run", "Run a command in a sandbox, and end with its exit code."),
        "attach": Verb("attach", "Go on with a command that runs in a sandbox."),
        "logs": Verb("attach", "Show what a command in the background has written."),
        "eval": Verb("evaluate", "Run Python in a sandbox's warm interpreter."),
        "cp": Verb("copy", "Copy files and directories between a sandbox and this host."),
        "port": Verb("sandboxes", "Show, publish or close ports of a sandbox."),
        "spawn": Verb("sandboxes", "Fork a snapshot many times, and print the sandboxes' ids."),
        "fork": Verb("sandboxes", "Fork a sandbox as it is now; it goes on."),
        "ls": Verb("sandboxes", "List the sandboxes."),
        "ps": Verb("sandboxes", "List the sandboxes."),
        "top": Verb("sandboxes", "Show the commands of a sandbox."),
        "inspect": Verb("details", "Show all about a sandbox, or a snapshot."),
        "standby": Verb("sandboxes", "Put sandboxes to standby: on the disk, out of the memory."),
        "resume": Verb("sandboxes", "Let sandboxes in standby go on."),
        "reset": Verb("sandboxes", "Take sandboxes back to their last branch, or their snapshot."),
        "wait": Verb(
            "sandboxes",
            "Wait until the commands end that sandboxes were made for, and print their exit codes.",
        ),
        "stop": Verb(
            "sandboxes",
            "Have the commands end that sandboxes were made for, and then the sandboxes.",
        ),
        "kill": Verb("sandboxes", "End sandboxes, and remove all they had."),
    },
    "Snapshots": {
        "from-image": Verb("snapshots", "Boot an image cold and publish it as a base snapshot."),
        "snapshot": Verb("snapshots", "Publish the state of a running sandbox; it goes on."),
        "snapshot-diff": Verb(
            "snapshots", "Fork a snapshot, run a command there, publish the result as a diff."
        ),
        "snapshot-compact": Verb("snapshots", "Make an equal snapshot that stands on no other."),
        "snapshot-info": Verb("images", "Show all about one snapshot."),
        "images": Verb("images", "List the snapshots."),
        "tree": Verb("chains", "Show which snapshot was made from which."),
        "diff": Verb(
            "chains",
            "Show what differs between two snapshots, in memory, on the disk and of files.",
        ),
        "rmi": Verb("snapshots", "Delete snapshots and their images."),
        "cache": Verb(
            "cache", "Show or remove what is kept of images that were run, or explain a miss."
        ),
        "prune": Verb("upkeep", "Delete the snapshots that no rule keeps."),
        "pool": Verb("pool", "Show or set how many machines wait for forks of a snapshot."),
    },
    "Store and host": {
        "du": Verb(
            "chains", "Show what snapshots, images, sandboxes and named volumes take on the disk."
        ),
        "compress": Verb(
            "upkeep",
            "Compress the memory layers of snapshots where they lie; everything works as before.",
        ),
        "check": Verb("check", "Check the store; exit code 0 if it is sound."),
        "pack": Verb(
            "packs", "Write a snapshot and its whole chain into one file, for another store."
        ),
        "unpack": Verb("packs", "Verify a pack, and make the snapshot in it one of the store."),
        "volume": Verb(
            "volume", "List named volumes, make them, or remove them with all their files."
        ),
        "events": Verb("events", "Show what happens to sandboxes and snapshots."),
        "serve": Verb("serve", "Serve the store over HTTP until interrupted."),
        "bench": Verb(
            "bench", "Measure Ratoon on this machine, beside what one would use instead."
        ),
        "jail": Verb("jail", "Show what QEMU and the programs that read disks are confined by."),
        "setup": Verb("setup", "Say what this host lacks and which command brings it."),
        "doctor": Verb(
            "system", "Check this host: what works, what does not, and what to do about it."
        ),
    },
}

VERBS = {name: verb for verbs in SUBJECTS.values() for name, verb in verbs.items()}
