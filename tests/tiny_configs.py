"""A tiny configuration of every type of model that can be converted.

If models of a type have them, a tiny one has dense layers before the first experts, shared experts,
biases, and layers of several kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORDS = [f"w{number}" for number in range(60)]
SENTINELS = [f"<extra_id_{number}>" for number in reversed(range(8))]
VOCABULARY = ["<pad>", "</s>", "<unk>", *WORDS, *SENTINELS]

Config = Mapping[str, Any]

_DECODER: Config = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
_LATENT_ATTENTION: Config = {  # as DeepSeek has it
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_LATENT: Config = {  # attention, shared experts and first layers as DeepSeek has them
    **_LATENT_ATTENTION,
    "moe_intermediate_size": 48,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
_INDEXER: Config = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}
_ROUTED: Config = {"head_dim": 16, "moe_intermediate_size": 48, "n_routed_experts": 4}
_EXPERTS: Config = {"head_dim": 16, "moe_intermediate_size": 48, "num_experts": 4}
_SHARED: Config = {"shared_expert_intermediate_size": 56}
_FIRST_DENSE: Config = {"mlp_layer_types": ["dense", "sparse"]}
_SLIDING: Config = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR: Config = {"layer_types": ["linear_attention", "full_attention"]}
_ROPE: Config = {"rope_type": "default", "rope_theta": 1e4}
_GLM: Config = {**_DECODER, **_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1}
_QWEN3: Config = {**_DECODER, **_EXPERTS, "norm_topk_prob": True}
_QWEN3_IMAGES: Config = {**_QWEN3, "rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}}
_QWEN3_NEXT: Config = {
    **_DECODER,
    **_EXPERTS,
    **_SHARED,
    **_LINEAR,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

# The language models of types that also read images or sound.
_ARIA: Config = {**_DECODER, "moe_num_experts": 4, "moe_num_shared_experts": 1}
_DEEPSEEK: Config = {**_DECODER, **_LATENT}
_DOTS3: Config = {
    **_DECODER,
    **_LATENT,
    **_INDEXER,
    "num_hidden_layers": 3,
    "head_dim": 24,
    "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
    "shared_experts_intermediate_size": 56,
    "sliding_window": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_GEMMA4: Config = {
    **_DECODER,
    **_EXPERTS,
    **_SLIDING,
    "top_k_experts": 2,
    "enable_moe_block": True,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": len(VOCABULARY),
}
_INKLING: Config = {
    **_DECODER,
    **_ROUTED,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 8,
    "layer_types": ["hybrid_sliding", "hybrid"],
}
_INKLING1: Config = {**_INKLING, **_FIRST_DENSE, "n_shared_experts": 1}
_INKLING2: Config = {
    **_INKLING,
    "unpadded_vocab_size": len(VOCABULARY),
    "n_layers_per_attn_res_block": 1,
}
_LLAMA4: Config = {
    **_DECODER,
    "head_dim": 16,
    "num_experts_per_tok": 1,
    "num_local_experts": 3,
    "intermediate_size_mlp": 56,
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 8,
}
_MINIMAX_M3: Config = {
    **_DECODER,
    **_FIRST_DENSE,
    "head_dim": 16,
    "rotary_dim": 8,
    "num_local_experts": 4,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 56,
    "layer_types": ["full_attention", "minimax_m3_sparse"],
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_block_size": 4,
    "index_topk_blocks": 2,
}
_NEMOTRON_H: Config = {
    **_DECODER,
    **_ROUTED,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 8,
    "n_groups": 1,
    "n_shared_experts": 1,
    "moe_latent_size": 40,
    "moe_shared_expert_intermediate_size": 56,
}
_QWEN4: Config = {
    **_QWEN3_NEXT,
    "hc_count": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [1],
    "ple_embed_dim": 16,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 20,
    "make_ngram_vocab_size_divisible_by": 4,
    "split_ngram_parts": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

# What they read images and sound with.
_TOWER: Config = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}
_SMALL_TOWER: Config = {**_TOWER, "pos_emb_height": 4, "pos_emb_width": 4}
_QWEN_VISION: Config = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_SAM: Config = {
    **_TOWER,
    "output_channels": 16,
    "downsample_channels": [24, 32],
    "global_attn_indexes": [0],
    "mlp_dim": 40,
    "window_size": 2,
}
_IMAGE: Config = {"image_token_id": 60}
_IMAGES: Config = {**_IMAGE, "video_token_id": 61}
_MEDIA: Config = {**_IMAGES, "audio_token_id": 62}
_QWEN3_OMNI: Config = {
    "text_config": _QWEN3_IMAGES,
    "vision_config": _QWEN_VISION,
    "audio_config": {
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 40,
        "output_dim": 64,
        "num_mel_bins": 8,
        "n_window": 2,
        "downsample_hidden_size": 8,
        "max_source_positions": 16,
    },
    **_MEDIA,
    "vision_start_token_id": 58,
}

CONFIGS: dict[str, Config] = {
    "afmoe": {
        **_DECODER,
        **_EXPERTS,
        **_SLIDING,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "mup_enabled": True,
    },
    "aria": {
        "text_config": {"model_type": "aria_text", **_ARIA},
        "vision_config": {"model_type": "idefics3_vision", **_TOWER},
        "projector_patch_to_query_dict": {16: 4},
        "image_token_index": 60,
    },
    "aria_text": _ARIA,
    "axk1": {**_DECODER, **_LATENT},
    "axk2": {**_DECODER, **_LATENT, **_INDEXER},
    "bailing_hybrid": {
        **_DECODER,
        **_LATENT,
        **_LINEAR,
        "head_dim": 16,
        "num_experts": 4,
        "num_nextn_predict_layers": 0,
    },
    "beam": {**_DECODER, **_EXPERTS, **_SLIDING, **_FIRST_DENSE, "n_group": 2, "topk_group": 1},
    "cohere2_moe": {
        **_DECODER,
        **_SLIDING,
        **_FIRST_DENSE,
        "head_dim": 16,
        "num_experts": 4,
        "num_shared_experts": 1,
    },
    "deepseek_ocr2": {
        "text_config": {**_GLM, **_FIRST_DENSE},
        "vision_config": {
            "sam_config": _SAM,
            "encoder_config": {**_TOWER, "num_key_value_heads": 2, "vocab_size": 8},
        },
        **_IMAGE,
    },
    "deepseek_v2": {**_DECODER, **_LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": {**_DECODER, **_LATENT, **_INDEXER},
    "deepseek_v4": {
        **_DECODER,
        **_ROUTED,
        **_INDEXER,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "q_lora_rank": 24,
        "o_lora_rank": 16,
        "o_groups": 2,
        "sliding_window": 8,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "hc_mult": 2,
        "num_nextn_predict_layers": 0,
    },
    "dots1": _GLM,
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {
            **_TOWER,
            "num_hidden_layers": 2,
            "moe_intermediate_size": 24,
            "pyramid_num_routed": [-1, 3],
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
        },
        "audio_config": {
            **_TOWER,
            "feature_size": 8,
            "downsample_hidden_size": 8,
            "adapter_input_size": 32,
            "adapter_out_dim": 64,
        },
        **_MEDIA,
    },
    "dots3_note_text": _DOTS3,
    "ernie4_5_moe": {
        **_DECODER,
        "moe_intermediate_size": 48,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
        "use_bias": True,
    },
    "exaone_moe": {**_DECODER, **_EXPERTS, **_SLIDING, "num_shared_experts": 1},
    "flex_olmo": {**_DECODER, "num_experts": 4},
    "flint": {**_DECODER, **_EXPERTS, **_SHARED, **_SLIDING, "mlp_only_layers": [0]},
    "gemma4": {
        "text_config": _GEMMA4,
        "vision_config": {
            **_TOWER,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "position_embedding_size": 16,
        },
        **_MEDIA,
    },
    "gemma4_text": _GEMMA4,
    "glm4_moe": {**_GLM, "use_qk_norm": True},
    "glm4_moe_lite": {**_DECODER, **_LATENT, **_FIRST_DENSE},
    "glm4v_moe": {
        "text_config": {
            **_GLM,
            "rope_parameters": {
                **_ROPE,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            },
        },
        "vision_config": _QWEN_VISION,
        **_IMAGES,
    },
    "glm5_next": {
        "text_config": {
            **_DECODER,
            **_LATENT,
            **_INDEXER,
            **_FIRST_DENSE,
            "qk_rope_head_dim": 0,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "indexed_attention"],
            "hc_mult": 2,
            "index_kpool": 4,
        },
        "vision_config": {**_QWEN_VISION, "projection_intermediate_size": 40},
        **_IMAGES,
    },
    "glm_moe_dsa": {
        **_DECODER,
        **_LATENT,
        **_INDEXER,
        "num_hidden_layers": 3,
        "indexer_types": ["full", "shared", "full"],
    },
    "gpt_oss": {
        **_DECODER,
        "head_dim": 16,
        "num_local_experts": 3,
        "sliding_window": 8,
        "rope_parameters": _ROPE,
    },
    "granitemoe": {
        **_DECODER,
        "num_local_experts": 3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "granitemoe_swa": {
        **_DECODER,
        **_SLIDING,
        "num_local_experts": 3,
        "shared_intermediate_size": 56,
    },
    "granitemoehybrid": {
        **_DECODER,
        **_LINEAR,
        "num_local_experts": 3,
        "shared_intermediate_size": 56,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 8,
        "position_embedding_type": "rope",
    },
    "granitemoeshared": {**_DECODER, "num_local_experts": 3, "shared_intermediate_size": 56},
    "hunyuan_v1_moe": {**_DECODER, "head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "hy_v3": {**_DECODER, **_EXPERTS, "num_shared_experts": 1},
    "hy_v4": {
        **_DECODER,
        **_LATENT,
        **_INDEXER,
        "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "indexer_types": ["full", "shared", "full"],
        "hc_mult": 2,
    },
    "inkling2": {
        "text_config": _INKLING2,
        "vision_config": {
            **_TOWER,
            "posemb_grid_size": 4,
            "projection_hidden_dim": 32,
            "text_hidden_size": 64,
        },
        **_IMAGE,
    },
    "inkling2_text": _INKLING2,
    "inkling_mm_model": {
        "text_config": _INKLING1,
        "vision_config": {
            **_TOWER,
            "num_hidden_layers": 3,
            "patch_size": 2,
            "num_channels": 1,
            "text_hidden_size": 64,
        },
        "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 8, "text_hidden_size": 64},
        **_MEDIA,
        "image_bos_token_id": 63,
        "audio_bos_token_id": 64,
    },
    "inkling_text": _INKLING1,
    "jamba": {
        **_DECODER,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "kimi_k2": _DEEPSEEK,
    "kimi_k25": {
        "text_config": {"model_type": "deepseek_v3", **_DEEPSEEK},
        "vision_config": _SMALL_TOWER,
        "projection_hidden_size": 32,
        **_IMAGES,
    },
    "kimi_linear": {
        **_DECODER,
        **_LATENT_ATTENTION,
        **_LINEAR,
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "kolibri1": {**_DECODER, **_EXPERTS, **_SHARED, **_SLIDING},
    "laguna": {**_DECODER, **_EXPERTS, **_SHARED, **_SLIDING},
    "lfm2_moe": {
        **_DECODER,
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
    "llama4": {
        "text_config": _LLAMA4,
        "vision_config": {
            **_TOWER,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        "image_token_index": 60,
    },
    "llama4_text": _LLAMA4,
    "mellum": {**_DECODER, **_EXPERTS, **_SLIDING, **_FIRST_DENSE},
    "mimo_v2_flash": {**_DECODER, **_ROUTED, **_SLIDING, **_FIRST_DENSE, "v_head_dim": 8},
    "minimax": {
        **_DECODER,
        **_LINEAR,
        "head_dim": 16,
        "num_local_experts": 3,
        "block_size": 8,
        "full_attn_alpha_factor": 1.5,
    },
    "minimax_m2": {**_DECODER, "head_dim": 16, "num_local_experts": 4},
    "minimax_m3_vl": {
        "text_config": _MINIMAX_M3,
        "vision_config": _TOWER,
        "projector_hidden_size": 32,
        "image_token_index": 60,
        "video_token_index": 61,
    },
    "minimax_m3_vl_text": _MINIMAX_M3,
    "mistral4": {**_DECODER, **_LATENT},
    "mistral_large4": {
        "text_config": {
            **_DECODER,
            **_LATENT,
            **_INDEXER,
            "num_hidden_layers": 3,
            "indexer_types": ["full", "shared", "full"],
            "no_rope_layers": [1, 1, 0],
        },
        "vision_config": {"model_type": "pixtral", **_TOWER},
        "image_token_index": 60,
    },
    "mixtral": {**_DECODER, "head_dim": 16, "num_local_experts": 3},
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_omni": {
        "text_config": {"model_type": "nemotron_h", **_NEMOTRON_H},
        "vision_config": {
            "model_type": "radio",
            **_TOWER,
            "max_img_size": 16,
            "video_temporal_patch_size": 2,
        },
        "audio_config": None,
        "projector_hidden_size": 32,
        "vision_hidden_size": 32,
        **_IMAGES,
    },
    "olmoe": {**_DECODER, "num_experts": 4},
    "phimoe": {**_DECODER, "num_local_experts": 4, "attention_bias": True},
    "qwen2_moe": {
        **_DECODER,
        **_SHARED,
        "num_experts": 4,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [0],
    },
    "qwen3_5_moe": {
        "text_config": _QWEN3_NEXT,
        "vision_config": _QWEN_VISION,
        **_IMAGES,
    },
    "qwen3_5_moe_text": _QWEN3_NEXT,
    "qwen3_moe": _QWEN3,
    "qwen3_next": {**_QWEN3_NEXT, "mlp_only_layers": [0]},
    "qwen3_omni_moe": {
        "thinker_config": _QWEN3_OMNI,
        "talker_config": {
            "text_config": {**_QWEN3_IMAGES, **_SHARED},
            "code_predictor_config": {**_QWEN3, "num_code_groups": 2},
            "thinker_hidden_size": 64,
            "num_code_groups": 2,
            "spatial_merge_size": 2,
        },
        "code2wav_config": {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "codebook_size": 8,
            "num_quantizers": 2,
            "decoder_dim": 32,
        },
    },
    "qwen3_omni_moe_thinker": _QWEN3_OMNI,
    "qwen3_vl_moe": {
        "text_config": _QWEN3_IMAGES,
        "vision_config": _QWEN_VISION,
        **_IMAGES,
    },
    "qwen4_exp": {"text_config": _QWEN4, "vision_config": _QWEN_VISION, **_IMAGES},
    "qwen4_exp_text": _QWEN4,
    "solar_open": _GLM,
    "step3p7": {
        "text_config": {
            **_DECODER,
            **_ROUTED,
            **_SLIDING,
            **_FIRST_DENSE,
            "share_expert_dim": 56,
            "num_sliding_attention_heads": 4,
            "swiglu_limits": [None, 1.0],
            "swiglu_limits_shared": [None, 1.0],
        },
        "vision_config": {**_TOWER, "mlp_ratio": 1.25, "max_position_embeddings": 16},
        **_IMAGE,
    },
    "switch_transformers": {
        "vocab_size": len(VOCABULARY),
        "d_model": 64,
        "d_kv": 8,
        "d_ff": 96,
        "num_heads": 2,
        "num_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "num_experts": 4,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
    "unlimited_ocr": {
        "text_config": {**_GLM, **_FIRST_DENSE},
        "vision_config": {"sam_config": _SAM, "encoder_config": _TOWER},
        **_IMAGE,
    },
    "zaya": {
        **_DECODER,
        **_EXPERTS,
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
        "sliding_window": 8,
        "layer_types": ["hybrid", "hybrid_sliding"],
    },
}

WRAPPERS: dict[str, Config] = {
    "internvl": {
        "text_config": {"model_type": "qwen3_moe", **_QWEN3},
        "vision_config": {**_TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        **_IMAGE,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral4", **CONFIGS["mistral4"]},
        "vision_config": {"model_type": "pixtral", **_TOWER},
        "image_token_index": 60,
    },
}
"""Models that need not have experts, around one that has."""
