"""Top-level keys of DeepSpeed's JSON, so that a misspelt one is refused: DeepSpeed ignores it.

Source: `deepspeed/runtime/config.py`, `constants.py` and the config modules they read, 0.19.8.
"""

from __future__ import annotations

# What Trimtab sets by itself from its own config; a second value would contradict the first.
OWNED_KEYS = {
    "train_batch_size": "schedule.batch_samples",
    "train_micro_batch_size_per_gpu": "engine.micro_batch_samples",
    "gradient_accumulation_steps": "engine.micro_batch_samples",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "schedule",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",
    "fp16": "engine.precision",
}

TOP_LEVEL_KEYS = frozenset(
    {
        *OWNED_KEYS,
        "activation_checkpointing",
        "aio",
        "amp",
        "autotuning",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "compile",
        "compression_training",
        "csv_monitor",
        "data_efficiency",
        "data_types",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "elasticity",
        "expert_parallel",
        "flops_profiler",
        "gradient_allreduce_op",
        "gradient_predivide_factor",
        "hybrid_engine",
        "log_level",
        "memory_breakdown",
        "nebula",
        "pipeline",
        "prescale_gradients",
        "progressive_layer_drop",
        "seq_parallel_communication_data_type",
        "sparse_attention",
        "sparse_gradients",
        "steps_per_print",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "use_data_before_expert_parallelism",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
