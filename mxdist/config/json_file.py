"""The JSON files of a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

from mxdist.errors import UserError


def read_json_object(file: Path, missing: str) -> dict[str, Any]:
    """The object in ``file``; ``missing`` is what to say when there is no such file.

    Raises:
        UserError: no file, or something else in it than a JSON object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object; fetch it again")
    return found
