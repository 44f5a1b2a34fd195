// The records that Python fills, each as one block, and that every device reads. What a record holds is said
// here and nowhere else: the module tells Python the names and formats of the fields, in their order, and
// Triton's kernels the words at which they stand. Host and device; no torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "host_device.h"

namespace nexus {

// How the elements of a stream are stored (codec.h).
enum class DType : int32_t { kOther = -1, kFloat32, kFloat64, kBFloat16, kFloat16, kInt8, kUInt8, kInt16 };

// A row for each, in their order.
struct StoredType {
  uint8_t bits;
  uint8_t dlpack_code;
};
constexpr StoredType kStoredTypes[] = {{32, 2}, {64, 2}, {16, 4}, {16, 2}, {8, 0}, {8, 1}, {16, 0}};
constexpr int kDTypes = sizeof(kStoredTypes) / sizeof(StoredType);
constexpr int kFloatTypes = 4;  // the first of them: what a parameter and a gradient may have

inline uint64_t item_size(DType dtype) { return kStoredTypes[static_cast<int>(dtype)].bits / 8; }

// Every stream of one parameter, in the same element order. The arithmetic is float64 for float64 parameters,
// float32 otherwise.
struct TensorRecord {
  void* param;
  const void* grad;  // null: no gradient in this step, so nothing of this tensor changes
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad; stored as exp_avg_sq is
  void* master_low;      // the low bits of a float32 master weight, of which `param` is the rest; or null
  float* exp_avg_scale;  // one for each kScaleBlock elements, of a moment in 8 bits; null for any other
  float* exp_avg_sq_scale;
  float* max_exp_avg_sq_scale;
  void* average;  // of the parameter's values after its updates, or null
  double* step;   // the parameter's own count of updates, a whole number up to 2^53
  int64_t numel;
  int64_t first;           // where element 0 is in the whole tensor, of which this may be a shard
  int64_t ordinal;         // of the parameter in the optimizer
  int64_t narrow_average;  // 1: `average` is stored as bfloat16, rounded by chance; 0: as it is computed
  int32_t group;
  int32_t place;  // the device's own: the tensor's first chunk, or for Triton the kind of its update
  DType param_dtype;
  DType grad_dtype;
  DType exp_avg_dtype;
  DType exp_avg_sq_dtype;
  DType master_low_dtype;       // kInt16: 16 bits, kUInt8: 8 bits, kOther: no master weight
  int32_t stochastic_rounding;  // 0: what is stored with fewer bits is rounded to nearest
};

NEXUS_FN DType average_dtype(const TensorRecord& tensor) {
  const bool is_double = tensor.param_dtype == DType::kFloat64;
  return tensor.narrow_average != 0 ? DType::kBFloat16 : is_double ? DType::kFloat64 : DType::kFloat32;
}

// Elements of a stream in 8 bits that share a scale. A tensor's last block may have fewer.
constexpr int64_t kScaleBlock = 128;

// A number that may come from a Python float, from a one-element tensor, or from a schedule.
struct Rate {
  double value;         // the float; used where `tensor` and `table` are null
  const void* tensor;   // one element, read at every step
  int64_t is_float64;   // of `tensor`, which else is float32
  const double* table;  // a schedule (schedule.h) of `layers` layers of `rows` rows, evaluated at every step
  int64_t layers;
  int64_t rows;
  const int64_t* clock;  // the count that the schedule is evaluated at; null: t, the completed updates
  double scale;          // multiplies the schedule
  double* last;          // where a schedule's value is left for the reader, once used
};

// What the user set for a parameter group.
struct Group {
  Rate lr;
  Rate weight_decay;
  double beta1;
  double beta2;
  double eps;
  double max_grad_norm;  // infinite: no clipping
  int64_t maximize;
  Rate average_decay;  // of the averages of the parameters: what an update leaves of one
};

// A ring in device memory in which each step leaves a row: what a training curve is drawn from. A row is
// float64: t, skipped (0 or 1), gradient norm, then of each group lr and clip coefficient.
struct History {
  int64_t* count;  // rows written so far; null: no history
  double* rows;    // slots x width: row i is in slot i % slots
  // One more than are read, so that an unfinished row never overwrites a readable one.
  int64_t slots;
  int64_t width;
};

// What all groups of an optimizer share on one device. Counters are int64 in device memory.
struct StepState {
  int64_t* completed;            // t: updates completed so far; the argument of every schedule
  int64_t* skipped;              // steps that changed nothing since their gradients were not finite
  const double* sum_of_squares;  // of every gradient as it stands in memory, or null if nobody asked for it
  double* grad_norm;             // where the norm is left for the reader
  const float* grad_scale;       // gradients are to be divided by this, or null
  const float* found_inf;        // nonzero: skip this step, or null
  int64_t skip_nonfinite;
  int64_t seed;      // of stochastic rounding
  int64_t advances;  // 0: the counters stay as they are, since another step ends this update
  History history;
};

// How Python's module struct names the type of a field; 'R' and 'H' are records within a record.
template <class T>
constexpr char format_of() {
  return std::is_same_v<T, Rate>      ? 'R'
         : std::is_same_v<T, History> ? 'H'
         : std::is_pointer_v<T>       ? 'P'
         : std::is_same_v<T, double>  ? 'd'
         : sizeof(T) == 8             ? 'q'
                                      : 'i';
}

struct Field {
  const char* name;
  char format;
  size_t size;
};

// What Python is told of each record: every field, in order.
template <class Record>
struct Fields;

#define NEXUS_FIELD(name) {#name, format_of<decltype(Record::name)>(), sizeof(Record::name)}
#define NEXUS_RECORD(record, ...)                   \
  template <>                                       \
  struct Fields<record> {                           \
    using Record = record;                          \
    static constexpr const char* kName = #record;   \
    static constexpr Field kFields[] = __VA_ARGS__; \
  };                                                \
  static_assert(is_complete<record>(), "every field has its name")

template <class Record>
constexpr bool is_complete() {
  size_t size = 0;
  for (const Field& field : Fields<Record>::kFields) {
    size += field.size;
  }
  return size == sizeof(Record);
}

#define F NEXUS_FIELD
NEXUS_RECORD(TensorRecord, {F(param),
                            F(grad),
                            F(exp_avg),
                            F(exp_avg_sq),
                            F(max_exp_avg_sq),
                            F(master_low),
                            F(exp_avg_scale),
                            F(exp_avg_sq_scale),
                            F(max_exp_avg_sq_scale),
                            F(average),
                            F(step),
                            F(numel),
                            F(first),
                            F(ordinal),
                            F(narrow_average),
                            F(group),
                            F(place),
                            F(param_dtype),
                            F(grad_dtype),
                            F(exp_avg_dtype),
                            F(exp_avg_sq_dtype),
                            F(master_low_dtype),
                            F(stochastic_rounding)});
NEXUS_RECORD(Rate,
             {F(value), F(tensor), F(is_float64), F(table), F(layers), F(rows), F(clock), F(scale), F(last)});
NEXUS_RECORD(Group, {F(lr), F(weight_decay), F(beta1), F(beta2), F(eps), F(max_grad_norm), F(maximize),
                     F(average_decay)});
NEXUS_RECORD(History, {F(count), F(rows), F(slots), F(width)});
NEXUS_RECORD(StepState, {F(completed), F(skipped), F(sum_of_squares), F(grad_norm), F(grad_scale),
                         F(found_inf), F(skip_nonfinite), F(seed), F(advances), F(history)});
#undef F

// All of an optimizer, as the host sees it: what a watch keeps up to date and every step reads.
struct Records {
  std::vector<TensorRecord> tensors;  // device by device
  std::vector<Group> groups;          // every group once for each device, device by device
};

// Elements [begin, begin + count) of one tensor.
struct Chunk {
  int64_t begin;
  int32_t count;
  int32_t tensor;
};

constexpr int64_t kChunkElements = 16384;

NEXUS_FN constexpr int64_t chunk_count(int64_t numel) {
  return (numel + kChunkElements - 1) / kChunkElements;
}

// Chunk `index` of a tensor of `numel` elements. All of it in int64: numel may exceed 2^31.
NEXUS_FN constexpr Chunk chunk_at(int64_t numel, int64_t index, int32_t tensor) {
  const int64_t begin = index * kChunkElements;
  const int64_t left = numel - begin;
  return {begin, static_cast<int32_t>(left < kChunkElements ? left : kChunkElements), tensor};
}

}  // namespace nexus
