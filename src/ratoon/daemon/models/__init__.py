"""What goes over the wire as JSON, as OpenAPI shows it: one module for each subject."""
