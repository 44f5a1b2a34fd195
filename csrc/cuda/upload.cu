// Bytes of the host to the device, in the arguments of kernels.
#include <cstring>

#include "kernels.h"
#include "launch.h"

namespace nexus::cuda {
namespace {

struct Payload {
  uint64_t words[kUploadBytes / sizeof(uint64_t)];
};

__global__ void store(uint64_t* to, int32_t count, const __grid_constant__ Payload payload) {
  const auto i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) {
    to[i] = payload.words[i];
  }
}

__global__ void divide_tensor(Table table) {
  const auto tensor = static_cast<int32_t>(blockIdx.x);
  if (tensor >= table.tensor_count) {
    return;
  }
  const TensorRecord& record = table.tensors[tensor];
  const int64_t chunks = chunk_count(record.numel);
  for (int64_t k = threadIdx.x; k < chunks || k == 0; k += blockDim.x) {
    table.chunks[record.place + k] = chunk_at(record.numel, k, tensor);
  }
}

}  // namespace

void upload(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  Payload payload;
  for (size_t done = 0; done < bytes; done += sizeof payload) {
    const size_t part = bytes - done < sizeof payload ? bytes - done : sizeof payload;
    memcpy(payload.words, static_cast<const char*>(from) + done, part);
    const auto words = static_cast<int32_t>(part / sizeof(uint64_t));
    launch("writing pointers to the device", store, (words + kThreads - 1) / kThreads, stream,
           reinterpret_cast<uint64_t*>(static_cast<char*>(to) + done), words, payload);
  }
}

void divide(const Table& table, cudaStream_t stream) {
  launch("dividing the tensors into chunks", divide_tensor, table.tensor_count, stream, table);
}

}  // namespace nexus::cuda
