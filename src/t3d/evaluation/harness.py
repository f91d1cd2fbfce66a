"""lm-evaluation-harness: any of its `generate_until` tasks at any decode setting, as model type `t3d`.

    python -m t3d.evaluation.harness --model t3d --model_args pretrained=runs/demo/student,steps=2 --tasks gsm8k

is `lm_eval` with our model type known to it; in Python, importing this module is enough.
"""

import sys
from dataclasses import fields, replace

import torch

from t3d.chat_template import render
from t3d.decoding.config import DecodingConfig
from t3d.engine import Engine
from t3d.errors import T3DError, nearest
from t3d.models import load_model
from t3d.models.load import require_tokenizer

try:
    import lm_eval.models  # noqa: F401  the harness registers its own only while it knows none
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise T3DError(f"lm-evaluation-harness does not import ({error}): pip install 't3d[lm-eval]'") from error

DECODING = {f.name for f in fields(DecodingConfig)} - {"n", "stop", "max_tokens"}


@register_model("t3d")
class T3DHarness(LM):
    """A block-diffusion checkpoint in the harness.

    pretrained: folder or hub id. batch_size: sequences in flight ("auto" or 1: the default). device, dtype, quantize:
    as in `load_model`. max_gen_toks: where a task says nothing. Any setting of `DecodingConfig` (steps, strategy,
    threshold, ...) is an argument too; a task's own temperature, top_k and top_p win where it samples.
    """

    def __init__(
        self,
        pretrained,
        batch_size=None,
        device=None,
        dtype=None,
        quantize=None,
        max_gen_toks=256,
        max_batch_size=None,
        **decoding,
    ):
        super().__init__()
        unknown = next((name for name in decoding if name not in DECODING), None)
        if unknown is not None:
            raise T3DError(f"model_args: unknown argument {unknown!r}{nearest(unknown, DECODING)}")
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness's command line says cuda where nothing was asked
        self.model, self.tokenizer = load_model(pretrained, dtype, device, quantize=quantize)
        require_tokenizer(self.tokenizer, pretrained)
        # the harness's command line says 1 where nothing was asked
        sizes = [size for size in (batch_size, max_batch_size) if size not in (None, "auto", 1, "1")]
        self.engine = Engine(self.model, self.tokenizer, **({"max_batch_size": int(sizes[0])} if sizes else {}))
        self.decoding, self.max_gen_toks = DecodingConfig(**decoding), int(max_gen_toks)
        self._device, self.pretrained = self.model.device, str(pretrained)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        prompts, configs = [], []
        for request in requests:
            context, wanted = request.args
            prompts.append(context)
            configs.append(self._config(normalize_gen_kwargs(wanted, self.max_gen_toks)))
        decoded = self.engine.generate(prompts, configs, progress=not disable_tqdm)
        answers = []
        for request, config, trajectory in zip(requests, configs, decoded, strict=True):
            answer = trajectory.text
            for stop in config.stop:
                answer = answer.split(stop, 1)[0]
            answers.append(answer)
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _config(self, wanted: dict) -> DecodingConfig:
        """Our settings with what the task asks for."""
        config = replace(
            self.decoding, max_tokens=wanted["max_gen_toks"], stop=tuple(stop for stop in wanted["until"] if stop)
        )
        if wanted["do_sample"]:
            sampling = {name: wanted[name] for name in ("temperature", "top_k", "top_p") if name in wanted}
            config = replace(config, **sampling)
        return config

    def loglikelihood(self, requests):
        raise T3DError(
            "t3d decodes and cannot rank given answers; choose tasks with output_type generate_until, such as gsm8k"
        )

    loglikelihood_rolling = loglikelihood

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        return render(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.replace("/", "__")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except T3DError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
