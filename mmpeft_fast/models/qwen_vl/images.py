"""Images of Qwen-VL: 448 x 448 pixels, bicubic, CLIP's mean and deviation; and paths of image files as ids.

Between `<img>` and `</img>` there are always as many ids as the resampler has queries: the UTF-8 bytes of a path, each
byte as its own id, then `<imgpad>`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.image_utils import infer_channel_dimension_format
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

# What PIL raises for a file that is no image, is cut short, is broken inside, or is too large to be one.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class QwenVLImageProcessor(CLIPImageProcessorPil):
    """CLIP's pixels of images as the publisher opens them, whichever way they come in (paths, PIL, arrays, tensors):
    `Image.open(path).convert("RGB")`, which drops alpha and does not turn an image by its EXIF orientation."""

    def fetch_images(self, image_url_or_urls):
        """Files of paths; what is no file is left to transformers, which turns what it loads by its orientation."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(one) for one in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, Path)) and Path(image_url_or_urls).is_file():
            return read_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, **kwargs) -> np.ndarray:
        """An RGB array [3, H, W]; arrays and tensors have 1 to 4 channels (L, LA, RGB, RGBA), first or last."""
        if isinstance(image, Image.Image):
            return np.moveaxis(np.asarray(opaque(image)), -1, 0)
        array = np.asarray(image)
        if array.ndim == 2:
            array = array[None]
        elif (input_data_format or infer_channel_dimension_format(array, num_channels=(1, 2, 3, 4))) == "channels_last":
            array = np.moveaxis(array, -1, 0)
        return array[:3] if len(array) >= 3 else np.repeat(array[:1], 3, axis=0)


def image_processor(size: int) -> QwenVLImageProcessor:
    """For whole images of `size` x `size`: no crop, no padding."""
    return QwenVLImageProcessor(
        size={"height": size, "width": size}, do_center_crop=False, crop_size={"height": size, "width": size}
    )


def path_bytes(path: str, num_ids: int) -> bytes:
    """A path as the bytes of a span.

    Raises:
        ValueError: the path is empty or has more than `num_ids` bytes.
    """
    data = path.encode()
    if not 0 < len(data) <= num_ids:
        raise ValueError(f"Qwen-VL: expected an image path of 1 to {num_ids} bytes, got {len(data)}: {path!r}")
    return data


def path_of(span: Sequence[int], pad_id: int) -> str:
    """The path in a span of ids.

    Raises:
        ValueError: the ids are not the UTF-8 bytes of a path followed by padding.
    """
    end = span.index(pad_id) if pad_id in span else len(span)
    try:
        path = bytes(span[:end]).decode()
    except ValueError:
        path = ""
    if not path or any(token != pad_id for token in span[end:]):
        raise ValueError(
            "Qwen-VL: expected pixel_values, or the bytes of a path and padding between <img> and </img>, "
            f"got the ids {list(span[:8])}.."
        )
    return path


def opaque(image: Image.Image) -> Image.Image:
    """The RGB image as the publisher converts it: alpha is dropped. What PIL keeps of a transparent colour goes too,
    since CLIP's processor would composite on white by it."""
    image = image.convert("RGB")
    image.info.pop("transparency", None)
    return image


def read_image(path: str | Path) -> Image.Image:
    """The decoded RGB image.

    Raises:
        ValueError: the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            return opaque(image)
    except _DECODE_ERRORS as error:
        raise ValueError(f"Qwen-VL: expected a readable image, but {path} cannot be decoded ({error})") from error
