"""Event files against tensorboardX's definitions of the format, and the checksum against its standard."""

import math
import struct

import numpy as np
import pytest

from jaxgen import tensorboard


def test_checksum_against_the_standard():
    assert tensorboard.crc32c(b"123456789") == 0xE3069283
    # RFC 3720, appendix B.4
    assert tensorboard.crc32c(bytes(32)) == 0x8A9136AA
    assert tensorboard.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert tensorboard.crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("step", [0, 1, 127, 128, 300, 2**31, 2**62])
def test_events_parse_as_what_they_say(tmp_path, step):
    from tensorboardX.proto.event_pb2 import Event

    # Names and values at the edges of the encoding: a long name takes a length of two bytes.
    values = {"": 0.0, "é" * 100: -1.5, "nan": math.nan, "big": 1e300, "x": 0.1}
    events = tensorboard.EventFile(tmp_path, step)
    events.scalars(step, values)
    events.close()
    [path] = tmp_path.iterdir()
    content, parsed = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        parsed.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    version, start, scalars = parsed
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (step, start.session_log.START)
    assert scalars.step == step
    read = {value.tag: value.simple_value for value in scalars.summary.value}
    expected = {**values, "big": math.inf, "x": float(np.float32(0.1))}
    np.testing.assert_equal(read, expected)
    assert version.wall_time <= start.wall_time <= scalars.wall_time
