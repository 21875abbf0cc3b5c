"""Change a model for a while: edits of attention by site, inside a `with`, and put back exactly."""

from nearfield.hosts.seam import Site
from nearfield.steer.base import Steer

__all__ = ["Site", "Steer"]
