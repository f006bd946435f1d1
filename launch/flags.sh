# shellcheck shell=bash
# Sourced by the scripts for GPUs: `use_gpu_flags` exports XLA_FLAGS with which several GPUs compute
# and communicate at the same time. What XLA_FLAGS already sets is kept.

use_gpu_flags() {
  local flag added=()
  for flag in latency_hiding_scheduler pipelined_{all_reduce,all_gather,reduce_scatter}; do
    [[ "${XLA_FLAGS:-}" == *"xla_gpu_enable_$flag="* ]] || added+=("--xla_gpu_enable_$flag=true")
  done
  local all="${XLA_FLAGS:+$XLA_FLAGS }${added[*]}"
  # XLA ends a process with a flag that it does not know, so they are tried in another one first.
  if XLA_FLAGS="$all" JAX_PLATFORMS=cpu python -c "import jax; jax.devices()" &> /dev/null; then
    export XLA_FLAGS="$all"
    echo "XLA_FLAGS=$XLA_FLAGS"
  else
    echo "This version of XLA refuses ${added[*]}: it trains without them." >&2
  fi
}
