"""MergeME's heterogeneous Mixture of Experts; importing this teaches transformers' Auto classes to load one."""

from transformers import AutoConfig, AutoModelForCausalLM

from mediator_cli.moe.heterogeneous.configuration import HeterogeneousMoeConfig
from mediator_cli.moe.heterogeneous.modelling import HeterogeneousMoeForCausalLM

__all__ = ["HeterogeneousMoeConfig", "HeterogeneousMoeForCausalLM"]

AutoConfig.register(HeterogeneousMoeConfig.model_type, HeterogeneousMoeConfig, exist_ok=True)
AutoModelForCausalLM.register(HeterogeneousMoeConfig, HeterogeneousMoeForCausalLM, exist_ok=True)
