"""Which Ratoon this is: the one place that says so, for the package as well."""

__version__ = "0.1.0"
