"""Commands encode, decode and reconstruct: files to codes, codes to files, and both at once."""

import argparse
import sys
from collections.abc import Callable, Iterator

import numpy as np
from huggingface_hub.utils import tqdm

from .code_file import FORMATS, Codes, codes_from_bytes
from .command_files import Job, jobs_of
from .command_media import Images, Recordings, media_of
from .command_model import DTYPES, Tokenizer, load_tokenizer

_MODEL = "folder or Hub id of an image or audio tokenizer"
_OUTPUT = "folder, made if it is not there; - for standard output"


def add_to(commands) -> None:
    """Add the commands to those of a command line."""
    encode = _parser(
        commands,
        "encode",
        "images or recordings to codes",
        "Write the codes of every image or recording, whole and at its own size, with the model's name and a "
        "digest of its weights.",
        run_encode,
    )
    encode.add_argument("input", nargs="+", help="files, folders, patterns, - for standard input")
    encode.add_argument(
        "--format", choices=[name[1:] for name in FORMATS], default="npz", help="default: npz"
    )
    decode = _parser(
        commands,
        "decode",
        "codes to images or recordings",
        "Write the PNG or WAV file of every file of codes. Codes of another model are refused.",
        run_decode,
    )
    decode.add_argument("input", nargs="+", help="files or folders of codes, - for standard input")
    both = _parser(
        commands,
        "reconstruct",
        "images or recordings through the codes and back",
        "Write what codes keep of every image or recording, as PNG or WAV.",
        run_reconstruct,
    )
    both.add_argument("input", nargs="+", help="files, folders, patterns, - for standard input")


def _parser(commands, name: str, short: str, text: str, run: Callable) -> argparse.ArgumentParser:
    text += " What is there already is left as it is; files that cannot be used are named, and exit status 1."
    parser = commands.add_parser(name, help=short, description=text)
    parser.add_argument("--model", required=True, help=_MODEL)
    parser.add_argument("--output", required=True, help=_OUTPUT)
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--batch-size", type=int, default=8, help="default: 8")
    parser.set_defaults(run=run)
    return parser


def run_encode(options: argparse.Namespace) -> int:
    """Encode the files; return 1 if some could not be."""
    tokenizer = _load(options)
    media, suffix = media_of(tokenizer), f".{options.format}"

    def is_done(job: Job) -> bool:
        if not job.is_done():
            return False
        found = codes_from_bytes(job.target.read_bytes(), str(job.target))
        if found.digest != tokenizer.digest:
            raise ValueError(f"{job.target} is there, of {found.model}: name another output folder")
        return True

    def encode(batch: list) -> list[bytes]:
        return [codes.to_bytes(suffix) for codes in _codes_of(tokenizer, media, batch)]

    jobs = jobs_of(options.input, options.output, media.read_suffixes, suffix)
    return _go_through(
        options, jobs, is_done, media.read, lambda sample: media.group(sample[0]), encode
    )


def run_decode(options: argparse.Namespace) -> int:
    """Decode files of codes; return 1 if some could not be."""
    tokenizer = _load(options)
    media = media_of(tokenizer)

    def read(content: bytes, name: str) -> Codes:
        codes = codes_from_bytes(content, name)
        if codes.digest != tokenizer.digest:
            raise ValueError(
                f"its codes are of {codes.model} (weights {codes.digest}), and {tokenizer.name} has other "
                f"weights ({tokenizer.digest})"
            )
        return codes

    jobs = jobs_of(options.input, options.output, FORMATS, media.made)
    return _go_through(options, jobs, Job.is_done, read, media.decoding_group, media.decode)


def run_reconstruct(options: argparse.Namespace) -> int:
    """Encode and decode the files; return 1 if some could not be."""
    tokenizer = _load(options)
    media = media_of(tokenizer)

    def reconstruct(batch: list) -> list[bytes]:
        return media.decode(_codes_of(tokenizer, media, batch))

    jobs = jobs_of(options.input, options.output, media.read_suffixes, media.made)
    return _go_through(
        options, jobs, Job.is_done, media.read, lambda sample: media.group(sample[0]), reconstruct
    )


def _load(options: argparse.Namespace) -> Tokenizer:
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
    return load_tokenizer(options.model, options.revision, options.device, options.dtype)


def _codes_of(tokenizer: Tokenizer, media: Images | Recordings, batch: list) -> list[Codes]:
    made = media.encode([values for values, _ in batch])
    return [
        Codes(codes.numpy().astype(np.int32), tokenizer.name, tokenizer.digest, sizes)
        for codes, (_, sizes) in zip(made, batch, strict=True)
    ]


def _go_through(
    options: argparse.Namespace,
    jobs: list[Job],
    is_done: Callable[[Job], bool],
    read: Callable[[bytes, str], object],
    group: Callable[[object], object],
    make: Callable[[list], list[bytes]],
) -> int:
    """Read, make and write in batches of one group, with a bar; name what fails on standard error."""
    bar = tqdm(total=len(jobs), unit="file", disable=None)
    failed, there, written = 0, 0, 0

    def fail(job: Job, error: Exception) -> None:
        nonlocal failed
        failed += 1
        bar.update()
        print(f"skipped {job.name}: {error}", file=sys.stderr)

    def samples() -> Iterator[tuple[Job, object]]:
        nonlocal there
        for job in jobs:
            try:
                if is_done(job):
                    there += 1
                    bar.update()
                    continue
                yield job, read(job.read(), job.name)
            except (ValueError, OSError) as error:
                fail(job, error)

    def finish(batch: list[tuple[Job, object]]) -> None:
        nonlocal written
        try:
            made = make([sample for _, sample in batch])
        except (ValueError, RuntimeError) as error:
            if len(batch) == 1:
                fail(batch[0][0], error)
                return
            for one in batch:  # one of them, or all together were too large
                finish([one])
            return
        for (job, _), content in zip(batch, made, strict=True):
            try:
                job.write(content)
            except OSError as error:
                fail(job, error)
                continue
            written += 1
            bar.update()

    batch: list[tuple[Job, object]] = []
    for job, sample in samples():
        if batch and group(sample) != group(batch[0][1]):
            finish(batch)
            batch = []
        batch.append((job, sample))
        if len(batch) == options.batch_size:
            finish(batch)
            batch = []
    if batch:
        finish(batch)
    bar.close()
    print(f"{written} written, {there} there already, {failed} skipped", file=sys.stderr)
    return 1 if failed else 0
