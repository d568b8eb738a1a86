"""Samples responses of a model to problems: python sample.py --model DIR "problem" …"""

from data.loader import encode, render_prompt
from fast.check import check_model
from fast.decode import loop_of
from model import load_model
from sample import Row, generate
from support.checkpoint import trained_with
from support.command import Parser, command
from support.config import check_options
from support.loading import check_window, pick_device, use_one_thread_if_small, window_of


@command("sample.py")
def main() -> None:
    parser = Parser(description="Samples responses of a model to each problem.")
    parser.add_argument("problems", nargs="+", metavar="PROBLEM")
    parser.add_argument("--model", required=True, help="a HuggingFace model folder, e.g. runs/prefix-rft-001/final")
    parser.add_argument("--samples", type=int, default=4, help="number of responses to each problem (default 4)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="sampling temperature, 0 is greedy (default 1)"
    )
    parser.add_argument("--max_response_tokens", type=int, default=128)
    parser.add_argument("--system", help="system message (default: the one the model was trained with)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args()
    check_options(args, samples=1, max_response_tokens=1, seed=0)
    system = trained_with(args.model).get("system", "") if args.system is None else args.system
    model, tokenizer = load_model(args.model, pick_device(args.device), check=check_model)
    use_one_thread_if_small(model)
    prompts = [render_prompt(tokenizer, problem, system) for problem in args.problems]
    encoded = [encode(tokenizer, prompt, "problem") for prompt in prompts]
    window, longest = window_of(model.config), max(map(len, encoded))
    check_window(window, longest, args.max_response_tokens, "max_response_tokens")
    samples = args.samples if args.temperature else 1  # greedy responses to a problem are all equal
    for problem, prompt, ids in zip(args.problems, prompts, encoded):
        rows = [Row(0, (args.seed, problem, i), ids, []) for i in range(samples)]
        print(f"prompt  {prompt}")
        budget, decode = args.max_response_tokens, loop_of(model)
        for row in generate(model, tokenizer, rows, budget, args.temperature, decode=decode):
            print(f"  -> {row.text}")


if __name__ == "__main__":
    main()
