"""The host's file server: a process of its own that serves the host's folders (``fileserver``) to a guest."""
