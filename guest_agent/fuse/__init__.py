"""A low-level FUSE server: the kernel's side of it below, the file system that it serves above.

Below: ``abi`` (pure), ``mounting``, ``device`` (one connection), ``notifier`` and the process it writes
through, ``notification_writer``. They know nothing of the host or of what a share contains.
"""
