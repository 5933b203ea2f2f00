"""The daemon's log: a JSON object in each line."""

from __future__ import annotations

import json
import logging
import sys


class JsonLines(logging.Formatter):
    """What is logged, as JSON; `error` is a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "at_unix": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def log_as_json(level: int) -> None:
    """Have all that this process logs go to stderr so."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
