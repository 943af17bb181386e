// All kernels as one unit, which build.rs compiles for GPUs; host/ compiles each file by itself, behind these headers. A namespace
// per file keeps helpers of one name apart; the kernels themselves have C names.
#include "attention.cuh"
#include "common.cuh"
#include "gelu.cuh"
#include "interpolate.cuh"
#include "layer_norm.cuh"
#include "mma.cuh"
#include "square_gradient.cuh"
#include "tables.cuh"
#include "windows.cuh"

namespace attention {
#include "attention.cu"
}
namespace attention_branch {
#include "attention_branch.cu"
}
namespace attention_input {
#include "attention_input.cu"
}
namespace attention_output {
#include "attention_output.cu"
}
namespace convolution {
#include "convolution.cu"
}
namespace depthwise {
#include "depthwise.cu"
}
namespace head {
#include "head.cu"
}
namespace layer_norm {
#include "layer_norm.cu"
}
namespace linear {
#include "linear.cu"
}
namespace loss {
#include "loss.cu"
}
namespace matrix {
#include "matrix.cu"
}
namespace memory {
#include "memory.cu"
}
namespace mix_ffn {
#include "mix_ffn.cu"
}
namespace mix_ffn_backward {
#include "mix_ffn_backward.cu"
}
namespace optimizer {
#include "optimizer.cu"
}
namespace patches {
#include "patches.cu"
}
namespace residual {
#include "residual.cu"
}
namespace resize {
#include "resize.cu"
}
