"""One image with its captions as a record of prepared shards: its fields, and to and from bytes.

Each record is a `tf.train.Example` as TFDS writes it for these features:

| feature | type | what it is |
|---|---|---|
| `key` | Text | its name, once in the data set |
| `image` | Image (H, W, 3) | bytes of a still, upright 8-bit JPEG, PNG or WebP, RGB or grey |
| `captions` | Sequence(Text) | none or several |
| `group` | Text | what does not lie in both splits; the key where the collection has no groups |
| `width`, `height` | int32 | of the image as it decodes |
| `aesthetic`, `watermark` | float32 | scores of the collection, NaN where it has none |

The bytes are made and read with TFDS's protocol buffers directly: its own serializer and parser are
three and seven times slower, and its features are not needed to read.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2


@dataclasses.dataclass(frozen=True)
class Record:
    """One image with its captions.

    Attributes:
      key: its name, once in a data set.
      image: bytes of a JPEG, PNG or WebP that any decoder shows as it is meant to be seen.
      captions: none or several.
      group: what does not lie in both splits; the key if empty.
      width, height: of the image as it decodes, in pixels.
      aesthetic, watermark: scores, NaN where there are none.
    """

    key: str
    image: bytes
    captions: tuple[str, ...] = ()
    group: str = ""
    width: int = 0
    height: int = 0
    aesthetic: float = math.nan
    watermark: float = math.nan

    def __post_init__(self):
        if not self.group:
            object.__setattr__(self, "group", self.key)

    def to_bytes(self) -> bytes:
        """The record in a shard; the same for the same fields."""
        example = tf_example_pb2.Example()
        feature = example.features.feature
        for name in ("key", "image", "group"):
            feature[name].bytes_list.value.append(_bytes(getattr(self, name)))
        captions = feature["captions"].bytes_list
        captions.value.extend(map(_bytes, self.captions))
        captions.SetInParent()  # there, though it may hold nothing
        for name in ("width", "height"):
            feature[name].int64_list.value.append(getattr(self, name))
        for name in ("aesthetic", "watermark"):
            feature[name].float_list.value.append(getattr(self, name))
        return example.SerializeToString(deterministic=True)

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """What `to_bytes`, or TFDS with these features, made. Raises `ValueError` for other."""
        try:
            feature = tf_example_pb2.Example.FromString(data).features.feature
            return cls(
                feature["key"].bytes_list.value[0].decode(),
                feature["image"].bytes_list.value[0],
                tuple(text.decode() for text in feature["captions"].bytes_list.value),
                feature["group"].bytes_list.value[0].decode(),
                feature["width"].int64_list.value[0],
                feature["height"].int64_list.value[0],
                feature["aesthetic"].float_list.value[0],
                feature["watermark"].float_list.value[0],
            )
        except (DecodeError, IndexError, UnicodeDecodeError) as e:
            raise ValueError(f"it is no record of an image with captions ({e})") from e


def features() -> tfds.features.FeaturesDict:
    """The features that TFDS reads records with."""
    return tfds.features.FeaturesDict(
        {
            "key": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "group": tfds.features.Text(),
            "width": tfds.features.Scalar(np.int32),
            "height": tfds.features.Scalar(np.int32),
            "aesthetic": tfds.features.Scalar(np.float32),
            "watermark": tfds.features.Scalar(np.float32),
        }
    )


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
