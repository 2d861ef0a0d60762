"""Keeps secrets inside the process: removes tokens, credentials and signatures from everything shown or logged.

Redaction is only for output. It is lossy (many tokens become "hf_..."), so its results must not name files, key caches
or be compared. Records use `without_secrets`, which changes only URLs.
"""

import base64
import logging
import os
import re
from typing import Any
from urllib.parse import unquote

_SECRET_VARIABLE = re.compile(
    r".*(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY(_ID)?|SECRET_?KEY|ACCOUNT_?KEY)", re.IGNORECASE
)
_SHORTEST = 8  # characters of a secret; shorter values of such variables are settings ("true")
# Query parameters that sign a URL or grant access, or that change with every new signature of the same object.
_SECRET_PARAMETER = re.compile(
    r"x-(amz|goog)-.*|(.*[-_])?(sig|signature|token|key|apikey|secret|password|credential|auth)"
    r"|awsaccesskeyid|googleaccessid|key-pair-id|policy|expires",
    re.IGNORECASE,
)


def unsigned(url: str) -> str:
    """The URL without user info and without the parameters that sign it; everything else is unchanged.

    A path on the Hub (`hf://`) has neither: a `?` in it belongs to the file's name. The same holds for local paths.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "hf":
        return url
    rest, hash_mark, fragment = rest.partition("#")
    rest, question_mark, query = rest.partition("?")
    server, slash, path = rest.partition("/")
    parameters = query.split("&")
    kept = [part for part in parameters if not _SECRET_PARAMETER.fullmatch(unquote(part.partition("=")[0]))]
    query = question_mark + "&".join(kept) if kept else ""
    return f"{scheme}://{server.rpartition('@')[2]}{slash}{path}{query}{hash_mark}{fragment}"


def without_secrets(text: str) -> str:
    """The text with each of its URLs `unsigned`."""
    return re.sub(r"[a-z][a-z0-9+.-]*://\S*", lambda url: unsigned(url[0]), text, flags=re.IGNORECASE)


def redact(text: str) -> str:
    """The text without tokens, and without the credentials and signatures of its URLs.

    The values of environment variables whose names mark secrets (HF_TOKEN, AWS_SECRET_ACCESS_KEY) are removed wherever
    they occur.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_VARIABLE.fullmatch(name):
            text = text.replace(value, "...")
    text = re.sub(r"(\w://)[^/?#\s'\"]*@", r"\1", text)
    text = re.sub(r"\w+://[^\s'\"<>]*", lambda url: unsigned(url[0]), text)
    # Clients also log a request's target without its host: "/x.parquet?X-Amz-Signature=...".
    text = re.sub(
        r"([?&])([\w%-]+)=[^\s&'\"]+",
        lambda found: f"{found[1]}{found[2]}=..." if _SECRET_PARAMETER.fullmatch(unquote(found[2])) else found[0],
        text,
    )
    text = re.sub(r"\b(hf_(?=[A-Za-z0-9]{12})|AKIA|ASIA|ya29\.)[\w.-]{6,}", r"\1...", text)
    text = re.sub(r"(?i)\b(bearer)\s+\S+", r"\1 ...", text)
    return re.sub(r"(?i)\b(basic)\s+(\S+)", _without_credentials, text)


def _without_credentials(basic: re.Match[str]) -> str:
    """HTTP's "Basic" is followed by user:password in base64; in other texts it is a word ("Basic Patterns")."""
    try:
        hidden = b":" in base64.b64decode(basic[2] + "==")
    except ValueError:
        hidden = False
    return f"{basic[1]} ..." if hidden else basic[0]


def redact_logs() -> None:
    """Redacts all log records of all libraries from now on: clients log the URLs they request."""
    make = logging.getLogRecordFactory()

    def redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg, record.args = redact(record.getMessage()), None
        return record

    logging.setLogRecordFactory(redacted)
