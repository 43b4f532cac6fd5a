"""Files of codes: .npz or .safetensors with the codes of one image or clip, and the model that made them."""

import io
import json
import zipfile
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

FORMATS = (".npz", ".safetensors")
_FORMAT = "simvq-codes"
# What reading a file raises that is none of codes, or damaged.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError, EOFError)
DAMAGE += (zipfile.BadZipFile, SafetensorError)


@dataclass
class Codes:
    """Codes of one image or clip.

    Attributes:
        codes: (h, w) of an image or (T,) of a clip, integers.
        model: name of the model that made them.
        digest: of its weights, as `weights_digest` gives it.
        sizes: what decoding needs besides: height and width, or samples and sampling_rate.
    """

    codes: np.ndarray
    model: str
    digest: str
    sizes: dict[str, int]

    def to_bytes(self, suffix: str) -> bytes:
        """Return the content of a file with this suffix, one of FORMATS."""
        about = {"model": self.model, "digest": self.digest, "sizes": self.sizes}
        text = json.dumps({"format": _FORMAT, **about})
        codes = np.ascontiguousarray(self.codes)
        if suffix == ".safetensors":
            return save_safetensors({"codes": codes}, metadata={_FORMAT: text})
        content = io.BytesIO()
        np.savez(content, codes=codes, metadata=np.array(text))
        return content.getvalue()


def codes_from_bytes(content: bytes, name: str) -> Codes:
    """Read a file of codes.

    Args:
        name: of the file, for messages.

    Raises:
        ValueError: if it is none, or damaged. Nothing of it is executed, and nothing larger than it is made.
    """
    try:
        codes, text = (_from_npz if content[:2] == b"PK" else _from_safetensors)(content)
        about = json.loads(text)
        sizes = {key: int(value) for key, value in about["sizes"].items()}
        found = Codes(codes, str(about["model"]), str(about["digest"]), sizes)
    except DAMAGE as error:
        raise ValueError(f"{name} is damaged or no file of codes: {error}") from error
    if found.codes.dtype.kind not in "iu" or found.codes.size == 0:
        raise ValueError(f"{name} holds {found.codes.dtype} of shape {found.codes.shape}, no codes")
    return found


def _from_npz(content: bytes) -> tuple[np.ndarray, str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("it is compressed: such files are written without")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return arrays["codes"], str(arrays["metadata"])


def _from_safetensors(content: bytes) -> tuple[np.ndarray, str]:
    codes = load_safetensors(content)["codes"]
    # Only the reader of files gives metadata: the header is JSON behind its length, in 8 bytes.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return codes, header["__metadata__"][_FORMAT]
