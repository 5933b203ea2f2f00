"""Programs that read what strangers have written run in a cell, where there is nothing to be had.

A cell is a root directory with a program, its libraries and /dev/null. What is started in it has a
user id of its own, no capability, the files that it was given, and no way to the host's others, to
its processes, or to its networks. This package knows no machine: it starts a program.

    user_namespace   where an ordinary user can make all of this
    tree     the root directory, a copy in the cache
    steps    what is taken from a thread before it starts the program, in order
    cell     the thread that goes in, and starts it
    errand   one run of a program that is waited for, and the files that it is lent
    inmates  which processes were started under a name
    layers   what holds of a process that runs, read off it
"""
