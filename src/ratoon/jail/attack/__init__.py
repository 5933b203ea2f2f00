"""A program that takes QEMU's place in a cell, and tries to get whatever it can.

It was written by somebody who did not know the jail. It runs on Python alone, in a cell that has
nothing else of this package, and prints one JSON object for each attempt, then `{"done": true}`.
"allowed" means that the attempt got the thing it was after. A refusal, a kill by the kernel and a
hang are all "denied". Where there was nothing to aim at, it is "denied" with a reason that begins
with "not tried:", so that a reader can tell it from a real refusal.

Dangerous calls are made so that the kernel's permission shows without the effect: with invalid
arguments that are only looked at after the permission check, or with the present value.

What it aims at (`targets`) may have `"only": [names]` (run these alone), `"skip": [names]` and
`"in_process": true` (make no child).

    attempts, targets, calls, around    what all attempts use
    running                             makes them, and tells
    expected                            what may be got, and why
    the others                          the attempts, by what they are after
"""
