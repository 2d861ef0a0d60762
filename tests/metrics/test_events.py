"""TensorBoard event files, read back by tensorboardX's protocol buffers."""

import struct
import subprocess
import sys
import time

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2

from jaxtrain.metrics import events
from jaxtrain.metrics.events import EventFile

# What other libraries import if they find it, and a run does not need.
UNUSED = ("torch", "boto3", "google.cloud.storage", "tensorboardX", "tensorboard", "transformers", "tensorflow")


def read(folder):
    """The events of a folder's single file. A record is length, its checksum, event, its checksum."""
    (path,) = folder.iterdir()
    assert path.name.startswith("events.out.tfevents.")
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        for part, found in ((data[:8], data[8:12]), (data[12 : 12 + length], data[12 + length : 16 + length])):
            crc = crc32c(part)
            assert struct.unpack("<I", found)[0] == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
        yield event_pb2.Event.FromString(data[12 : 12 + length])  # pyright: ignore[reportAttributeAccessIssue]
        data = data[16 + length :]


def test_events_are_read_back(tmp_path):
    file = EventFile(tmp_path, 301)
    numbers = {"train/loss": 4.5421, "data/tokens": 123_456_789_012.0, "train/perplexity": 1e300, "a" * 300: -0.0}
    file.write(301, numbers, {"samples/0": "    def f(x):\n", "samples/1": "é" * 200})
    file.write(2**40, {}, {})
    file.close()
    version, start, step, last = read(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (301, 1)
    assert abs(step.wall_time - time.time()) < 60
    assert (step.step, last.step) == (301, 2**40)
    scalars = {value.tag: value.simple_value for value in step.summary.value[:4]}
    assert scalars == pytest.approx(numbers | {"train/perplexity": 3.4e38}, rel=1e-7)
    texts = {value.tag: value for value in step.summary.value[4:]}
    assert texts.keys() == {"samples/0/text_summary", "samples/1/text_summary"}
    text = texts["samples/1/text_summary"]
    assert (text.metadata.plugin_data.plugin_name, text.tensor.dtype) == ("text", 7)
    assert [dim.size for dim in text.tensor.tensor_shape.dim] == [1]
    assert text.tensor.string_val[0].decode() == "é" * 200


def test_the_checksum_is_crc32c():
    """The check value of the CRC catalog (CRC-32/ISCSI), masked."""
    crc = 0xE3069283
    assert events._masked_checksum(b"123456789") == struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


@pytest.mark.slow
def test_a_run_imports_nothing_that_it_does_not_use():
    """torch alone is half of the imports of a start where it is installed, and importing it is easily let in."""
    code = f"import sys, jaxtrain.main, jaxtrain.trainer.loop; print({set(UNUSED)} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
