"""Trains in two processes that talk through gloo on CPUs, launched with the shipped accelerate configurations.

accelerate shards on accelerators only: on a CPU it takes FSDP and DeepSpeed for DDP. So its view of the machine is
changed (`_Accelerator.pretend`), and what then runs is the real FSDP 2 and DeepSpeed, on CPU tensors.
"""

import json
import os
import socket
import traceback
from importlib import import_module
from pathlib import Path

from tests.conftest import make_model

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


def environment(strategy: str) -> dict[str, str]:
    """What `accelerate launch --config_file recipes/accelerate/STRATEGY.yaml` sets for its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    command = ["--config_file", str(RECIPES / f"{strategy}.yaml"), "--num_processes", "2", "script.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        found = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        found = prepare_multi_gpu_env(arguments)
    return {name: found[name] for name in found if name.startswith(("ACCELERATE_", "FSDP_"))}


def pretend() -> None:
    """Let accelerate take the CPU for an accelerator whose backend is gloo."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def work(rank: int, port: int, strategy: str, folder: str, settings: dict, resume: str | None, log: str) -> None:
    """One of the two processes: trains, and writes what was logged and the student."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    try:
        os.environ |= environment(strategy)
        sharding = strategy != "ddp"
        if sharding:
            pretend()
        if strategy.startswith("zero"):
            os.environ["DS_ACCELERATOR"] = "cpu"
            backend = import_module("deepspeed.comm.torch")  # the attribute of that name is torch itself
            backend.build_shm_op = lambda: None  # an operator that it would compile for minutes
        train(folder, settings | {"use_cpu": not sharding, "ddp_backend": "gloo"}, resume)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def parity(text, trajectory, forwards) -> float:
    """A reward that answers to one prompt differ in."""
    return float(sum(trajectory.response_ids) % 2)


def train(folder: str, settings: dict, resume: str | None = None) -> None:
    import torch
    from safetensors.torch import save_file

    from t3d.distill import T3DTrainer
    from tests.distill.test_trainer import config, trajectories

    torch.set_num_threads(1)
    data = trajectories()
    for trajectory in data:
        trajectory.correct = True
    arguments = config(folder, dataloader_pin_memory=False, **settings)
    trainer = T3DTrainer(make_model(), arguments, data, answer_prompts=lambda t: [7, 8, 9, *t.prompt_ids])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_student(Path(folder) / "student", torch.float32, make_model)
    if trainer.critic is not None:
        weights = {name: w.detach().clone() for name, w in trainer.critic.model.named_parameters()}
        save_file(weights, Path(folder) / f"critic-{trainer.accelerator.process_index}.safetensors")
    if trainer.accelerator.is_main_process:
        (Path(folder) / "log.json").write_text(json.dumps(trainer.state.log_history))
    if trainer.accelerator.num_processes > 1:
        torch.distributed.barrier()


def launch(context, strategy: str, folder: Path, settings: dict, resume: Path | None = None) -> None:
    """Train in two processes of `context` (a forkserver) and wait for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    logs = [folder / f"rank{rank}.txt" for rank in range(2)]
    processes = [
        context.Process(
            target=work, args=(rank, port, strategy, str(folder), settings, resume and str(resume), str(logs[rank]))
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
