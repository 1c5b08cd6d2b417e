"""The host's file server: a process of its own that answers a guest's filesystem calls from shared folders.

``tree`` serves one folder; everything below it is synchronous and may be called from any thread.
"""
