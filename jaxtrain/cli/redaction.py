"""No secret leaves the process: tokens, credentials and signatures are cut out of whatever is shown or written."""

import logging
import os
import re
from typing import Any

_SECRET_VARIABLE = re.compile(
    r".*(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY(_ID)?|SECRET_?KEY|ACCOUNT_?KEY)", re.IGNORECASE
)
_SHORTEST = 8  # characters of a secret; shorter values of such variables are settings ("true")
# Where a request's target is shown without its server ("/x.parquet?X-Amz-Signature=...").
_SECRET_PARAMETER = re.compile(
    r"([?&](?:x-(?:amz|goog)-[\w-]*|[\w-]*(?:sig|signature|token|apikey|api_key|secret|password|credential))=)[^\s&'\"]+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """`text` without tokens, without the credentials of its URLs, and without their queries (signatures).

    Values of environment variables that hold secrets by their names (HF_TOKEN, AWS_SECRET_ACCESS_KEY) go wherever they
    stand.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_VARIABLE.fullmatch(name):
            text = text.replace(value, "...")
    text = re.sub(r"(\w://)[^/?#\s'\"]*@", r"\1", text)
    text = re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\"<>]*", r"\1", text)
    text = _SECRET_PARAMETER.sub(r"\1...", text)
    text = re.sub(r"\b(hf_|AKIA|ASIA|ya29\.)[\w.-]{6,}", r"\1...", text)
    return re.sub(r"(?i)\b(bearer|basic)\s+\S+", r"\1 ...", text)


def redact_logs() -> None:
    """From now on no record of any library's logger holds a secret: clients log the addresses that they ask."""
    make = logging.getLogRecordFactory()

    def redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg, record.args = redact(record.getMessage()), None
        return record

    logging.setLogRecordFactory(redacted)
