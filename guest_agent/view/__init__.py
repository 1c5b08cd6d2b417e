"""The guest's files for its host to look at (``agentctl view``): a process of its own that serves them.

``places`` says what there is, ``docker`` and ``overlay`` how to come by it; ``server`` serves it (``fileserver``).
"""
