"""Images of Qwen-VL: 448 x 448 pixels, bicubic, CLIP's mean and deviation; and paths of image files as ids.

Between `<img>` and `</img>` there are always as many ids as the resampler has queries: the UTF-8 bytes of a path, each
byte as its own id, then `<imgpad>`.
"""

from collections.abc import Sequence

from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

# What PIL raises for a file that is no image, is cut short, is broken inside, or is too large to be one.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def image_processor(size: int) -> CLIPImageProcessorPil:
    """CLIP's processor for whole images of `size` x `size`: no crop, no padding."""
    return CLIPImageProcessorPil(
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


def read_image(path: str) -> Image.Image:
    """The decoded RGB image.

    Raises:
        ValueError: the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            return opaque(image)
    except _DECODE_ERRORS as error:
        raise ValueError(f"Qwen-VL: expected a readable image, but {path} cannot be decoded ({error})") from error
