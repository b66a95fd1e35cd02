# shellcheck shell=bash
# Sourced by the scripts for several machines: what NCCL is told. A variable that is set already stays, and goes to
# every machine; uncomment a line, or export it before the script.
#
# Gloo (CPUs) needs nothing: each machine finds at run time which of its interfaces leads to the first one, and sets
# GLOO_SOCKET_IFNAME for itself. torch ends a process whose NCCL failed by default (TORCH_NCCL_ASYNC_ERROR_HANDLING), and
# mslt one that waits longer than --timeout-minutes; TORCH_NCCL_BLOCKING_WAIT would only slow both down.

export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" # says what fails; INFO also says which network was taken

# torch's store says in pages of stacks that another machine has left; WARNING shows them.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"

# The interface for NCCL's meeting point, and for its data where there is no InfiniBand. By default the first that is
# neither loopback nor Docker's: wrong on machines with another network for management. `=` in front: exactly this one.
# export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-=eth0}"

# 1 where InfiniBand or RoCE is there but not usable: "ibv_..." errors, or a hang in the first step.
# export NCCL_IB_DISABLE="${NCCL_IB_DISABLE:-1}"

# Which InfiniBand cards, where some lead elsewhere (storage).
# export NCCL_IB_HCA="${NCCL_IB_HCA:-mlx5_0,mlx5_1}"

# 1 where GPUs of one machine hang in the first step: a virtual machine or an IOMMU that breaks their direct way.
# export NCCL_P2P_DISABLE="${NCCL_P2P_DISABLE:-1}"

# Keeps each rank's last collectives, to be written out where one hangs (torch's flight recorder).
# export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
