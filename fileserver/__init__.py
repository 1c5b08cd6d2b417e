"""Serving a tree: whoever has files that the other side may use answers its filesystem calls from here.

``tree`` serves one folder; everything below it is synchronous and may be called from any thread. ``calls`` takes what
comes over a link, ``shares`` has one folder at work. The host runs it for its folders (``host_agent/fileserver``).
"""
