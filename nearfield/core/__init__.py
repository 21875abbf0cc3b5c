"""What every floor above needs: errors, per-dimension arguments, backend choice, tolerances."""

from nearfield.core.dims import per_dim
from nearfield.core.errors import BackendUnavailable, MissingPackage, require

__all__ = ["BackendUnavailable", "MissingPackage", "per_dim", "require"]
