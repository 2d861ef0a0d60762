"""Flag and field names of other training systems, and their equivalents here."""

# What to write → names of flags or fields elsewhere, in lower case with underscores.
_INSTEAD = {
    "--config.data.sources.NAME.name=ORG/DATASET": (
        "dataset dataset_name hf_dataset data dataset_path hf_path datasets.path"
    ),
    "--config.data.sources.NAME.config_name=SUBSET": "dataset_config dataset_config_name subset",
    "--config.data.sources.NAME.column=text": "text_column text_field text_key",
    "--config.data.sources.NAME.max_samples=N": "max_samples num_samples max_train_samples max_examples n_samples",
    "nothing, since datasets are streamed by default; --config.data.mode=download or pretokenized keeps them": (
        "stream streaming use_streaming"
    ),
    "--workdir=DIR": (
        "experiment experiment_name exp run run_name output_dir out_dir save_dir checkpoint_dir save_folder "
        "base_output_directory job.dump_folder overwrite_output_dir"
    ),
    "the same command again: it resumes from the newest checkpoint in --workdir": (
        "resume resume_from resume_from_checkpoint load_checkpoint load_path auto_resume"
    ),
    "--config.micro_batch_tokens=N to bound them: gradients are accumulated over as few micro-batches as fit": (
        "gradient_accumulation gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad_batches "
        "micro_batch_size device_batch_size device_train_microbatch_size"
    ),
    "--config.model.dtype=float32 or bfloat16 (mixed precision with float32 parameters, the default)": (
        "mixed_precision precision bf16 fp16 dtype amp"
    ),
    "--config.stages[0].batch_size=ROWS or --config.stages[0].tokens_per_batch=N, over all devices": (
        "batch_size train_batch_size global_batch_size per_device_batch_size per_device_train_batch_size "
        "total_batch_size global_train_batch_size local_batch_size"
    ),
    "--config.stages[0].seq_len=N, up to --config.model.max_seq_len": (
        "seq_len seq_length max_seq_length sequence_length sequence_len max_length context_length block_size "
        "max_target_length"
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
    "--config.clip_norm=1.0": "grad_clip max_grad_norm max_norm gradient_clipping clip_grad",
    "--config.steps=N": "steps max_steps train_steps num_steps num_train_steps max_iters num_iterations max_duration",
    "--config.epochs=N": "epochs num_epochs num_train_epochs max_epochs",
    "--config.total_tokens=N": "tokens total_tokens max_tokens train_tokens num_tokens target_param_data_ratio",
    "--config.seed=N": "seed random_seed",
    "--config.tokenizer.name=ORG/MODEL, or --config.tokenizer=TrainTokenizer to train one": (
        "tokenizer tokenizer_name tokenizer_path tokenizer_dir"
    ),
    "the config of that size, for example --config=configs/pretrain.py:small": (
        "model model_name model_size size preset depth module"
    ),
    "--config.init_from=ORG/MODEL or a work directory": (
        "model_name_or_path pretrained from_pretrained init_from base_model initial_checkpoint_dir"
    ),
    "--config.teacher.model=ORG/MODEL": "teacher teacher_model distill distillation",
    "--config=configs/270m_curriculum.py": "curriculum",
    "--config.checkpoint.every_steps=N": (
        "save_steps save_every save_interval checkpoint_every checkpoint_period checkpoint.interval"
    ),
    "--config.eval.every_steps=N, with --config.data.holdout=0.01": (
        "eval_steps eval_every eval_interval eval.interval do_eval"
    ),
    "--config.log_every=N": "log_steps logging_steps log_interval",
    "--config.monitor.trackers=wandb": "wandb use_wandb wandb_project report_to tracker with_tracking",
    "--config.data.workers=N": "num_workers workers dataloader_num_workers",
    "--config.data.shuffle_window=N": "shuffle_buffer shuffle_buffer_size buffer_size",
    "--config.model.remat=full": (
        "gradient_checkpointing activation_checkpointing activation_checkpoint.mode remat_policy"
    ),
    "--config.mesh.data=N, --config.mesh.fsdp=N or --config.mesh.tensor=N": (
        "fsdp tensor_parallel tp dp zero_stage deepspeed tensor_parallel_degree data_parallel_shard_degree "
        "ici_fsdp_parallelism ici_tensor_parallelism dcn_data_parallelism"
    ),
    "launch/local.sh N COMMAND for N processes; one process uses all of its devices": (
        "num_gpus gpus nproc_per_node num_devices devices"
    ),
    "a launcher, since one process per host uses all of its devices: launch/slurm.sbatch, skypilot.yaml, tpu_vm.sh": (
        "num_nodes nnodes local_rank node_rank world_size master_addr"
    ),
    "--config.optimizer.weight_decay=0.1": "weight_decay wd",
    "--config.model.hidden_size=N": "d_model n_embd emb_dim base_emb_dim hidden_dim",
    "--config.model.num_layers=N": "n_layer base_num_decoder_layers",
    "--config.data.holdout=0.01, the share of documents that evaluations use": (
        "val_set_size validation_split val_split"
    ),
    "--config.precision=fp8": "fp8 use_fp8",
    "nothing, since every step is compiled": "compile torch_compile enable_compile",
    "nothing, since documents are always packed; --config.stages[0].packing=fit keeps them whole": (
        "sample_packing packing group_texts"
    ),
    "nothing, since the fastest attention is chosen; --config.model.attention sets it": (
        "flash_attention flash_attn use_flash_attention attn_implementation"
    ),
    "python -m tools.export_hf --workdir=DIR --output=DIR afterwards": "push_to_hub hub_model_id export",
    "a Python file with get_config(arg), such as --config=configs/1b.py": "config_file job.config_file",
    "nothing, since the command always trains": "do_train train",
}
_BY_NAME = {name: instead for instead, names in _INSTEAD.items() for name in names.split()}


def advice(name: str) -> str:
    """What to write instead of another system's flag or field, as a sentence; "" if the name is not known.

    Args:
        name: The flag or field, also with what it is in, such as `training.seq_len`.
    """
    name = name.lower().replace("-", "_")
    instead = _BY_NAME.get(name) or _BY_NAME.get(name.rpartition(".")[2])
    return f" Here that is {instead}." if instead else ""
