"""Which files the guest must not keep data of, because a program of the host has them open for writing.

Such a program may have mapped the file, and stores there without a word: neither fanotify(7) nor a time stamp tells of
them. The law: data of a file is promised only if it is heard when somebody opens the file, and nobody had it open for
writing when that was looked at last. While somebody has, each question about it is answered ``stale``.
"""

from __future__ import annotations

from collections.abc import Callable

from fileserver.datafiles import DataFiles
from fileserver.leases import Writers, writers
from fileserver.nodes import Node, Shared
from fileserver.signatures import suspect
from fileserver.watches import Watches


class Sharing:
    """Of one share's files. Thread-safe."""

    def __init__(self, files: DataFiles, watches: Watches, doubt: Callable[[Node], None]) -> None:
        """``doubt`` is told of a file of which the guest may have been promised something that does not hold."""
        self._files = files
        self._watches = watches
        self._doubt = doubt

    def is_due(self, node: Node) -> bool:
        """Whether something can come of looking again: the file was shared, or its mark is a new one."""
        if node.shared:
            return True
        watches = self._watches
        return node.base is not None and not watches.hears_opens(node) and watches.token(node) is not None

    def look(self, node: Node, descriptor: int) -> None:
        """Data of the file, which is acquired and open as ``descriptor``, is about to be given to the guest, or was. A
        writer of this process's own, which stands in the way, is best closed before (``DataFiles.close_writer``)."""
        self._watches.watch_opens(node, descriptor)  # before it is looked at: who comes later is heard
        if node.writer is not None:
            node.shared = max(node.shared, Shared.PERHAPS)
            return
        found, before = writers(descriptor), node.shared
        if found is Writers.NONE:
            if before == Shared.WITH_WRITERS and node.base is not None:
                suspect(node)
            elif before == Shared.PERHAPS:
                node.heard = None  # one that has come and gone meanwhile may have stored without a word
            node.shared = Shared.WITH_NOBODY
        else:
            surely = found is Writers.SOME and not node.locked and node.writer is None
            node.shared = Shared.WITH_WRITERS if surely else Shared.PERHAPS
            if before < node.shared:
                self._doubt(node)

    def look_again(self, node: Node) -> None:
        """Before an answer about a file, which is acquired, or after somebody has opened it. Raises ``OSError``."""
        self._files.close_writer(node)
        file = self._files.reader(node)
        try:
            self.look(node, file.descriptor)
        finally:
            self._files.release(file)
