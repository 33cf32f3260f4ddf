"""Methods and families of other packages: each names a module that registers them (`register_method`,
`register_family`) as an entry point of the group `mmpeft_fast.plugins`."""

from importlib import metadata

GROUP = "mmpeft_fast.plugins"


def load_plugins() -> None:
    """Imports what installed packages name. Raises ValueError where one cannot be imported."""
    for point in metadata.entry_points(group=GROUP):
        try:
            point.load()
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"plugin {point.name} = {point.value}: cannot be loaded: {error}") from error
