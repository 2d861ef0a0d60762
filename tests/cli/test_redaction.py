"""Possible secrets are cut out of texts and log records; the rest stays. See also tests/e2e/test_secrets.py."""

import logging

import pytest

from jaxtrain.cli.redaction import redact, redact_logs


@pytest.mark.parametrize(
    "text",
    [
        "GET https://store.example/x.parquet?X-Amz-Signature=PLANTED&Expires=1 failed",
        "https://user:PLANTED@example.org/x",
        "https://user:p@PLANTED@example.org/x",
        "Max retries exceeded with url: /x.parquet?list=1&X-Amz-Credential=PLANTED&Expires=1",
        "HTTP/1.1 GET /cdn/x?Signature=PLANTED",
        "Authorization: Bearer PLANTED",
        "Authorization: Basic dXNlcjpQTEFOVEVE",
        "token hf_PLANTEDPLANTED was refused",
        "the key is kPLANTED/0123456789+",
    ],
)
def test_what_goes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "kPLANTED/0123456789+")
    assert "PLANTED" not in redact(text)
    assert "dXNlcjpQTEFOVEVE" not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "see https://example.org/a/b.parquet, please",
        "hf://datasets/org/name@0123abc/data/train.parquet",
        "is it? /a/b?list=1 'x' me@example.org",
        "HF_TOKEN_PATH is /home/somebody/token, TOKENIZERS_PARALLELISM is false-ish",
        "basis: 3 tokens",
        "Stage 1/10 Basic Patterns, basic English",
    ],
)
def test_what_stays(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/somebody/token")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-ish")
    monkeypatch.setenv("MY_TOKEN", "tokens")
    assert redact(text) == text


def test_log_records_of_any_library(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    try:
        redact_logs()
        logging.getLogger("some.client").warning("GET %s gave %d", "https://a.example/x?sig=PLANTED", 200)
    finally:
        logging.setLogRecordFactory(before)
    assert caplog.messages == ["GET https://a.example/x gave 200"]
