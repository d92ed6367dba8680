"""What other trainers call the keys of tunekit: diffusers' scripts, sd-scripts, OneTrainer, SimpleTuner."""

from __future__ import annotations

_KEYS = {
    "name": "output_name run_name project_name job_name",
    "runs": "output_dir output_folder save_dir logging_dir workspace_dir",
    "seed": "random_seed rng_seed global_seed",
    "model.family": "model_type base_model_type architecture arch model_family",
    "model.source": "pretrained_model_name_or_path base_model base_model_name model_name model_path"
    " checkpoint pretrained_model ckpt model_name_or_path base_model_path",
    "model.base": "extras_name_or_path",
    "model.revision": "model_revision commit branch tag",
    "model.variant": "weights_variant",
    "data.path": "train_data_dir instance_data_dir image_dir dataset dataset_name dataset_path data_dir"
    " images pictures folder instance_images_dir",
    "data.resolution": "size image_size res max_resolution pixels",
    "data.crop": "center_crop random_crop crop_type",
    "data.flip": "random_flip flip_aug horizontal_flip hflip",
    "data.cache": "cache_dir cache_latents cache_latents_to_disk cache_path",
    "data.split": "dataset_split",
    "data.image_column": "image_key image_field",
    "data.caption_column": "text_column prompt_column caption_field caption_key",
    "data.streaming": "stream dataset_streaming",
    "data.tolerate": "skip_bad_images ignore_errors on_bad_files skip_errors",
    "data.buckets": "enable_bucket bucketing aspect_ratio_bucketing multi_aspect",
    "data.caption_prefix": "trigger_word prefix caption_trigger activation_word",
    "data.caption_dropout": "caption_dropout_rate proportion_empty_prompts caption_dropout_probability",
    "data.validation": "validation_split validation_data_dir val_split eval_split held_out validation_share",
    "data.instance_prompt": "instance_token subject_prompt",
    "data.class_prompt": "class_token regularization_prompt",
    "data.class_path": "class_data_dir reg_data_dir regularization_dir class_images_dir",
    "data.class_pictures": "num_class_images class_images num_reg_images",
    "data.prior_weight": "prior_loss_weight prior_preservation_weight",
    "adapter.kind": "network_module network_type algo lora_type peft_type use_dora",
    "adapter.rank": "network_dim network_rank dim lora_rank lora_dim lora_r r",
    "adapter.alpha": "network_alpha lora_alpha",
    "adapter.dropout": "network_dropout lora_dropout",
    "adapter.targets": "target_modules lora_target_modules lora_layers targeted_modules",
    "train.max_steps": "max_train_steps num_train_steps train_steps steps iterations num_steps total_steps"
    " num_iterations",
    "train.lr": "learning_rate unet_lr base_lr",
    "train.batch_size": "train_batch_size effective_batch_size bs batch",
    "train.optimizer": "optimizer_type optim optimizer_name use_8bit_adam",
    "train.betas": "adam_beta1 adam_beta2 beta1 beta2 optimizer_betas",
    "train.eps": "adam_epsilon epsilon optimizer_eps",
    "train.weight_decay": "adam_weight_decay decay wd",
    "train.schedule": "lr_scheduler lr_scheduler_type scheduler_type learning_rate_scheduler",
    "train.warmup_steps": "lr_warmup_steps num_warmup_steps lr_warmup warmup learning_rate_warmup_steps",
    "train.max_grad_norm": "gradient_clip_val clip_grad_norm grad_clip gradient_clipping",
    "train.checkpoint_every": "checkpointing_steps save_steps save_every_n_steps save_every checkpoint_steps"
    " save_interval",
    "train.keep_checkpoints": "checkpoints_total_limit save_total_limit save_last_n_steps",
    "train.validate_every": "eval_steps eval_every validate_every_n_steps evaluation_steps",
    "train.log_every": "logging_steps log_steps log_interval log_every_n_steps",
    "train.keep_best": "save_best save_best_only load_best_model_at_end monitor metric_for_best_model",
    "train.early_stop": "early_stopping early_stopping_patience patience",
    "train.trackers": "report_to log_with logger tracker",
    "objective.snr_gamma": "min_snr_gamma min_snr",
    "objective.noise_offset": "offset_noise",
    "objective.prediction": "prediction_type v_parameterization v_prediction parameterization",
    "objective.zero_terminal_snr": "rescale_betas_zero_snr zero_snr ztsnr",
    "objective.timesteps": "timestep_sampling weighting_scheme timestep_distribution timestep_type",
    "objective.shift": "discrete_flow_shift flow_shift timestep_shift",
    "objective.loss": "loss_type loss_function",
    "objective.huber_delta": "huber_c",
    "preview.prompts": "validation_prompt validation_prompts sample_prompts sample_prompt sample",
    "preview.every": "validation_steps sample_every sample_every_n_steps sample_steps validation_epochs",
    "preview.guidance": "guidance_scale cfg_scale cfg",
    "preview.steps": "num_inference_steps sampling_steps inference_steps",
    "preview.negative_prompt": "negative negative_prompts validation_negative_prompt",
    "memory.precision": "mixed_precision dtype train_dtype compute_dtype amp",
    "memory.base_precision": "quantize base_model_precision load_in_4bit load_in_8bit fp8_base quantization",
    "memory.micro_batch": "gradient_accumulation_steps accumulation accumulation_steps micro_batch_size"
    " grad_accum per_device_train_batch_size",
    "memory.gradient_checkpointing": "activation_checkpointing grad_checkpointing checkpointing",
    "memory.sharding": "fsdp fsdp_config fsdp_version sharding_strategy zero_stage zero deepspeed",
    "memory.offload": "blocks_to_swap cpu_offload block_swap offloading low_vram lowvram",
    "memory.optimizer_in_backward": "fused_backward_pass fused_back_pass",
    "memory.budget": "vram max_vram memory_limit vram_limit",
    "memory.device": "accelerator gpu gpu_ids device_id",
    "optimize": "passes chain post_training export",
}
KEYS = {word: key for key, words in _KEYS.items() for word in words.split()}
"""Another trainer's word -> our dotted key."""

_EPOCHS = "give train.max_steps: epochs x pictures (tunekit check counts them) / train.batch_size"
_ACCUMULATION = (
    "train.batch_size is the whole batch, memory.micro_batch what is computed at once; their ratio is the"
    " accumulation"
)
_ENCODERS = "the denoiser alone is trained; leave it out"
_ALWAYS = "it is always so; leave it out"
_REMARKS = {
    "num_train_epochs max_train_epochs epochs num_epochs": _EPOCHS,
    "gradient_accumulation_steps accumulation accumulation_steps grad_accum": _ACCUMULATION,
    "use_dora": "give adapter.kind=dora",
    "use_8bit_adam": "give train.optimizer=adamw8bit",
    "v_parameterization v_prediction": "give objective.prediction=v_prediction",
    "load_in_4bit": "give memory.base_precision=nf4",
    "load_in_8bit": "give memory.base_precision=int8",
    "fp8_base": "give memory.base_precision=fp8, or int8, which takes as much memory and rounds less",
    "random_crop": "give data.crop=random",
    "cache_latents cache_latents_to_disk": "it is always so; data.cache names the folder",
    "repeats num_repeats dataset_repeats": "train.max_steps alone counts steps; leave it out",
    "caption_extension caption_ext": "captions are .txt files beside the pictures, or metadata.jsonl",
    "train_text_encoder text_encoder_lr train_te": _ENCODERS,
    "xformers enable_xformers_memory_efficient_attention sdpa": _ALWAYS,
}
REMARKS = {word: remark for words, remark in _REMARKS.items() for word in words.split()}
"""Another trainer's word -> what to do, where that is more than another name."""


def known_as(word: str) -> tuple[str, str]:
    """Our dotted key for another trainer's word ("Learning-Rate"), and what to do; "" where there is none."""
    plain = word.strip().lower().replace("-", "_").replace(" ", "_").lstrip("_")
    return KEYS.get(plain, ""), REMARKS.get(plain, "")
