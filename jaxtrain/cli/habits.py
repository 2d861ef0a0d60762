"""Flag and field names of other training systems, and their equivalents here."""

# What to write → names of flags or fields elsewhere, in lower case with underscores.
_INSTEAD = {
    "--config.data.sources.NAME.name=ORG/DATASET": "dataset dataset_name hf_dataset data dataset_path",
    "--config.data.sources.NAME.config_name=SUBSET": "dataset_config dataset_config_name subset",
    "--config.data.sources.NAME.column=text": "text_column text_field text_key",
    "--config.data.sources.NAME.max_samples=N": "max_samples num_samples max_train_samples max_examples n_samples",
    "nothing, since datasets are streamed by default; --config.data.mode=download or pretokenized keeps them": (
        "stream streaming use_streaming"
    ),
    "--workdir=DIR": "experiment experiment_name exp run run_name output_dir out_dir save_dir checkpoint_dir",
    "the same command again: it resumes from the newest checkpoint in --workdir": (
        "resume resume_from resume_from_checkpoint load_checkpoint auto_resume"
    ),
    "--config.micro_batch_tokens=N to bound them: gradients are accumulated over as few micro-batches as fit": (
        "gradient_accumulation gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad_batches "
        "micro_batch_size"
    ),
    "--config.model.dtype=float32 or bfloat16 (mixed precision with float32 parameters, the default)": (
        "mixed_precision precision bf16 fp16 dtype amp"
    ),
    "--config.stages[0].batch_size=ROWS or --config.stages[0].tokens_per_batch=N, over all devices": (
        "batch_size train_batch_size global_batch_size per_device_batch_size per_device_train_batch_size"
    ),
    "--config.stages[0].seq_len=N, up to --config.model.max_seq_len": (
        "seq_len seq_length max_seq_length sequence_length max_length context_length block_size"
    ),
    "--config.optimizer.learning_rate=3e-4": "lr learning_rate max_lr peak_lr",
    "--config.optimizer=AdamW": "adam adam_w adamw_torch adamw_torch_fused",
    "--config.optimizer=ScheduleFreeAdamW": "schedule_free schedulefree schedule_free_adam",
    "--config.optimizer=Signum": "tiger signsgd sign_sgd",
    (
        "--config.optimizer=Muon or a file of your own (CONTRIBUTING.md), since optax has no SOAP or Shampoo, and its "
        "Sophia needs second derivatives of the loss, which no step computes"
    ): "soap shampoo sophia",
    "--config.optimizer.schedule=Cosine, Constant, Linear or WSD": "lr_scheduler lr_scheduler_type scheduler schedule",
    "--config.optimizer.schedule.warmup_fraction=0.01 or --config.optimizer.schedule.warmup_tokens=N": (
        "warmup warmup_steps warmup_ratio num_warmup_steps warmup_iters"
    ),
    "--config.clip_norm=1.0": "grad_clip max_grad_norm gradient_clipping clip_grad",
    "--config.steps=N": "steps max_steps train_steps num_steps num_train_steps max_iters",
    "--config.epochs=N": "epochs num_epochs num_train_epochs max_epochs",
    "--config.total_tokens=N": "tokens total_tokens max_tokens train_tokens num_tokens",
    "--config.seed=N": "seed random_seed",
    "--config.tokenizer.name=ORG/MODEL, or --config.tokenizer=TrainTokenizer to train one": (
        "tokenizer tokenizer_name tokenizer_path"
    ),
    "the config of that size, for example --config=configs/pretrain.py:small": "model model_size size preset",
    "--config.init_from=ORG/MODEL or a work directory": "model_name_or_path pretrained from_pretrained init_from",
    "--config.teacher.model=ORG/MODEL": "teacher teacher_model distill distillation",
    "--config=configs/270m_curriculum.py": "curriculum",
    "--config.checkpoint.every_steps=N": "save_steps save_every save_interval checkpoint_every",
    "--config.eval.every_steps=N, with --config.data.holdout=0.01": "eval_steps eval_every eval_interval",
    "--config.log_every=N": "log_steps logging_steps log_interval",
    "--config.monitor.trackers=wandb": "wandb use_wandb report_to tracker with_tracking",
    "--config.data.workers=N": "num_workers workers dataloader_num_workers",
    "--config.data.shuffle_window=N": "shuffle_buffer shuffle_buffer_size buffer_size",
    "--config.model.remat=full": "gradient_checkpointing activation_checkpointing",
    "--config.mesh.data=N, --config.mesh.fsdp=N or --config.mesh.tensor=N": "fsdp tensor_parallel tp dp zero_stage",
    "launch/local.sh N COMMAND for N processes; one process uses all of its devices": (
        "num_gpus gpus nproc_per_node num_devices devices"
    ),
}
_BY_NAME = {name: instead for instead, names in _INSTEAD.items() for name in names.split()}


def advice(name: str) -> str:
    """What to write instead of another system's flag or field, as a sentence; "" if the name is not known."""
    instead = _BY_NAME.get(name.lower().replace("-", "_"))
    return f" Here that is {instead}." if instead else ""
