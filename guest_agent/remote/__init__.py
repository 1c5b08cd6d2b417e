"""The agents on a machine that is not a VM of ours, reached over SSH: they outlive the connection, and end later.

    SSH ── sshd ── connect ··· hands its stdin and stdout over ···> daemon (the agent of a plane)

A plane's daemon is the same agent as in a VM. What QEMU and systemd do there is done here: ``connector`` finds the
daemon, or starts it, and gives it what it has instead of a port (``door``); ``ending`` ends it; ``rundir`` is where
they meet. ``capabilities`` is what such a machine can do. Nothing here changes the machine.
"""
