"""What the room's own tests have, too."""

from tests.fileserver.conftest import place as place
