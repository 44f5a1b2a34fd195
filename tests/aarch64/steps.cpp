// Runs steps of every way of storing a tensor, and prints a line for each: its name, and a hash of all bits
// that the steps leave. Compiled for two processors, it has to print the same. Inputs are made of integers,
// so that they are the same everywhere.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "codec.h"
#include "cpu/step.h"

namespace {

using namespace nexus;

constexpr int kSteps = 3;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {  // splitmix64
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }

  // Of either sign, below 1, times a power of two down to 2^-15: exact in float32.
  float number() {
    const uint64_t x = bits();
    const float fraction = static_cast<float>(static_cast<int32_t>(x & 0x1ffffffu) - 0x1000000) * 0x1p-24f;
    return fraction * float_of_bits((127u - ((x >> 32) & 15u)) << 23);
  }

 private:
  uint64_t state_;
};

// What is rarely met: subnormal, huge, infinite, NaN, negative zero.
constexpr float kSpecial[] = {
    1e-40f, -1e-45f, 6e4f, -3e38f, 65520.0f, std::numeric_limits<float>::infinity(), -INFINITY, NAN, -0.0f};
constexpr auto kSpecials = static_cast<int64_t>(sizeof kSpecial / sizeof *kSpecial);

// A stream of a tensor. It begins one element after an aligned address.
struct Stream {
  DType dtype = DType::kOther;
  std::vector<uint8_t> bytes;

  Stream() = default;
  Stream(DType type, int64_t numel)
      : dtype(type), bytes((static_cast<size_t>(numel) + 1) * item_size(type)) {}

  void* data() { return bytes.empty() ? nullptr : bytes.data() + item_size(dtype); }

  template <class T>
  T& at(int64_t i) {
    return static_cast<T*>(data())[i];
  }

  void put(int64_t i, float value) {
    switch (dtype) {
      case DType::kFloat32:
        return encode(value, at<float>(i));
      case DType::kFloat64:
        return encode(static_cast<double>(value), at<double>(i));
      case DType::kBFloat16:
        return encode(value, at<BFloat16>(i));
      case DType::kFloat16:
        return encode(value, at<Float16>(i));
      default:
        break;
    }
  }
};

// FNV-1a. Every NaN counts as the same: which one arithmetic makes is the processor's own.
class Hash {
 public:
  void add(const void* data, size_t size) {
    for (size_t i = 0; i < size; ++i) {
      value_ = (value_ ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3u;
    }
  }

  template <class T>
  void add_number(T x) {
    const T same = x != x ? std::numeric_limits<T>::quiet_NaN() : x;
    add(&same, sizeof same);
  }

  void add(Stream& stream) {
    if (stream.bytes.empty()) {
      return;
    }
    const auto n = static_cast<int64_t>(stream.bytes.size() / item_size(stream.dtype)) - 1;
    for (int64_t i = 0; i < n; ++i) {
      if (stream.dtype == DType::kFloat32) {
        add_number(stream.at<float>(i));
      } else if (stream.dtype == DType::kFloat64) {
        add_number(stream.at<double>(i));
      } else if (stream.dtype == DType::kFloat16 && (stream.at<uint16_t>(i) & 0x7fffu) > 0x7c00u) {
        add_number(NAN);
      } else {
        add(&stream.at<uint8_t>(i * static_cast<int64_t>(item_size(stream.dtype))), item_size(stream.dtype));
      }
    }
  }

  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325u;
};

struct Case {
  DType param = DType::kFloat32, grad = DType::kFloat32;
  DType exp_avg = DType::kFloat32, exp_avg_sq = DType::kFloat32;
  DType master_low = DType::kOther;
  bool by_chance = false, amsgrad = false, averaged = false, narrow_average = false, special = false;
};

constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16", "int8", "uint8", "int16"};

std::string type_name(DType dtype) { return kNames[static_cast<int>(dtype)]; }

std::string name(const Case& c) {
  std::string text = type_name(c.param) + ", gradient " + type_name(c.grad) + ", moments " +
                     type_name(c.exp_avg) + " " + type_name(c.exp_avg_sq);
  text += c.master_low == DType::kOther ? "" : ", master " + type_name(c.master_low);
  text += c.by_chance ? ", by chance" : "";
  text += c.amsgrad ? ", amsgrad" : "";
  text += !c.averaged ? "" : c.narrow_average ? ", narrow average" : ", average";
  return text + (c.special ? ", specials" : "");
}

struct Tensor {
  int64_t numel;
  Stream param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master_low, average;
  std::vector<float> scales[3];
  double step = 0.0;
  double beta_products[3] = {1.0, 1.0, 0.0};  // from the start: pow() is the library's

  Tensor(const Case& c, int64_t n) : numel(n), param(c.param, n), grad(c.grad, n) {
    exp_avg = Stream(c.exp_avg, n);
    exp_avg_sq = Stream(c.exp_avg_sq, n);
    max_exp_avg_sq = c.amsgrad ? Stream(c.exp_avg_sq, n) : Stream();
    master_low = c.master_low != DType::kOther ? Stream(c.master_low, n) : Stream();
    const DType computed = c.param == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    average = c.averaged ? Stream(c.narrow_average ? DType::kBFloat16 : computed, n) : Stream();
    for (auto& each : scales) {
      each.assign(static_cast<size_t>((n + kScaleBlock - 1) / kScaleBlock), 0.0f);
    }
  }

  TensorRecord record(const Case& c, int64_t ordinal) {
    TensorRecord r = {};
    r.param = param.data();
    r.grad = grad.data();
    r.exp_avg = exp_avg.data();
    r.exp_avg_sq = exp_avg_sq.data();
    r.max_exp_avg_sq = max_exp_avg_sq.data();
    r.master_low = master_low.data();
    r.exp_avg_scale = scales[0].data();
    r.exp_avg_sq_scale = scales[1].data();
    r.max_exp_avg_sq_scale = scales[2].data();
    r.average = average.data();
    r.step = &step;
    r.beta_products = beta_products;
    r.numel = numel;
    r.first = 1001 * ordinal;
    r.ordinal = ordinal;
    r.narrow_average = c.narrow_average;
    r.param_dtype = c.param;
    r.grad_dtype = c.grad;
    r.exp_avg_dtype = c.exp_avg;
    r.exp_avg_sq_dtype = c.exp_avg_sq;
    r.master_low_dtype = c.master_low;
    r.stochastic_rounding = c.by_chance;
    return r;
  }
};

Rate rate(double value) {
  Rate rate = {};
  rate.value = value;
  return rate;
}

// Tensors of one group, and what a step of theirs needs.
class Run {
 public:
  Run(const Case& c, const std::vector<int64_t>& sizes, const cpu::Kernels* kernels) : step_(records_) {
    group.lr = rate(1e-2);
    group.weight_decay = rate(0.1);
    group.beta1 = rate(0.9);
    group.beta2 = rate(0.99);
    group.eps = rate(1e-8);
    group.max_grad_norm = rate(c.special ? INFINITY : 1.0);
    group.lr_scale = rate(1.0);
    group.average_decay = rate(0.9);
    group.maximize = c.amsgrad;
    tensors.reserve(sizes.size());
    for (size_t k = 0; k < sizes.size(); ++k) {
      tensors.emplace_back(c, sizes[k]);
      records_.tensors.push_back(tensors[k].record(c, static_cast<int64_t>(k)));
    }
    step_.kernels = kernels;
    step_.state.completed = &completed_;
    step_.state.skipped = &skipped_;
    step_.state.sum_of_squares = &sum_;
    step_.state.grad_norm = &norm_;
    step_.state.grad_scale = &grad_scale;
    step_.state.seed = 12345;
    step_.state.advances = 1;
    step_.divide();
  }

  std::vector<Tensor> tensors;
  Group group = {};
  float grad_scale = 2.0f;

  void step(int threads) {
    records_.groups = {group};
    sum_ = step_.sum_of_squares(threads);
    step_.run(threads);
    hash_.add_number(norm_);
  }

  void print(const std::string& name) {
    for (Tensor& t : tensors) {
      for (Stream* stream :
           {&t.param, &t.exp_avg, &t.exp_avg_sq, &t.max_exp_avg_sq, &t.master_low, &t.average}) {
        hash_.add(*stream);
      }
      for (const auto& scales : t.scales) {
        for (const float scale : scales) {
          hash_.add_number(scale);
        }
      }
    }
    printf("%s: %016llx\n", name.c_str(), static_cast<unsigned long long>(hash_.value()));
  }

 private:
  Records records_;
  cpu::Step step_;
  Hash hash_;
  int64_t completed_ = 0, skipped_ = 0;
  double sum_ = 0.0, norm_ = 0.0;
};

void run_case(const Case& c, const std::vector<int64_t>& sizes, int threads, const cpu::Kernels* kernels) {
  Run run(c, sizes, kernels);
  Random random(1);
  for (Tensor& tensor : run.tensors) {
    for (int64_t i = 0; i < tensor.numel; ++i) {
      tensor.param.put(i, random.number());
    }
  }
  for (int step = 0; step < kSteps; ++step) {
    for (Tensor& tensor : run.tensors) {
      for (int64_t i = 0; i < tensor.numel; ++i) {
        const float value = random.number();
        const bool is_special = c.special && i % 37 == 36 && i / 37 < kSpecials;
        tensor.grad.put(i, is_special ? kSpecial[i / 37] : value);
      }
    }
    run.step(threads);
  }
  run.print(name(c) + (threads == 1 ? "" : ", threads"));
}

// A gradient of all numbers of 16 bits: the first moment is what was read.
void read_halves(DType half, const cpu::Kernels* kernels) {
  Case c;
  c.grad = half;
  c.special = true;
  Run run(c, {1 << 16}, kernels);
  run.grad_scale = 1.0f;
  run.group.beta1 = rate(0.0);
  for (int i = 0; i < 1 << 16; ++i) {
    run.tensors[0].grad.at<uint16_t>(i) = static_cast<uint16_t>(i);
  }
  run.step(1);
  run.print("every " + type_name(half) + " read");
}

// A parameter that becomes minus the gradient, rounded: numbers of every exponent, ties and their neighbours.
void write_halves(DType half, const cpu::Kernels* kernels) {
  constexpr uint32_t kLowBits[] = {0x0, 0x1, 0xfff};
  constexpr int kUpper = 1 << 17;
  Case c;
  c.param = half;
  c.special = true;
  Run run(c, {3 * kUpper}, kernels);
  run.grad_scale = 1.0f;
  run.group.lr = run.group.eps = rate(0x1p60);
  run.group.beta1 = run.group.beta2 = run.group.weight_decay = rate(0.0);
  for (int i = 0; i < 3 * kUpper; ++i) {
    const uint32_t upper = 0x30000u + static_cast<uint32_t>(i / 3);  // from 2^-31 to 2^33, of either sign
    run.tensors[0].grad.at<float>(i) =
        float_of_bits((upper << 12 | kLowBits[i % 3]) ^ (i % 2 ? 0x80000000u : 0u));
  }
  run.step(1);
  run.print(type_name(half) + " written");
}

// A step's rate on each curve, as it is: some need functions of the C library, whose last bit is its own.
void print_rates() {
  struct Named {
    const char* name;
    Curve curve;
    double span, k, q;
  };
  constexpr Named kCurves[] = {
      {"constant", Curve::kConstant, 1.0, 0.0, 0.0},
      {"rise", Curve::kRise, 997.0, 0.0, 0.0},
      {"linear", Curve::kLinear, 997.0, 0.0, 0.0},
      {"sqrt", Curve::kSqrt, 997.0, 0.0, 0.0},
      {"square", Curve::kPower, 997.0, 1.0, 2.0},
      {"sampled", Curve::kSampled, 200.0, 2.0 * kColumns, 7.0},
      {"cosine (library)", Curve::kCosine, 997.0, 1.0, 1.0},
      {"power (library)", Curve::kPower, 997.0, 1.7, 2.3},
      {"exponential (library)", Curve::kExponential, 997.0, 0.05, 0.05},
      {"staircase (library)", Curve::kStaircase, 100.0, 0.0, 0.7},
      {"inverse (library)", Curve::kInverse, 100.0, 0.0, 0.6},
      {"log (library)", Curve::kLog, 997.0, 0.3, 0.0},
      {"tanh (library)", Curve::kTanh, 997.0, -6.0, 3.0},
  };
  constexpr double kForever = 0x1p53;
  for (const auto& [name, curve, span, k, q] : kCurves) {
    const double offset = curve == Curve::kLog ? 1.0 : 0.0;
    const double table[3][kColumns] = {
        {0.0, 1.0, kForever, 1.0},
        {static_cast<double>(curve), 0.0, kForever, offset, span, 6e-4, 6e-5, k, q},
        {0.1, 0.5, 0.2, 0.9, 0.3, 0.7, 1.0}};
    for (int64_t t = 0; t < 997; t += 31) {
      printf("rate, %s, step %d: %a\n", name, static_cast<int>(t), evaluate_schedule(table[0], 1, 3, t));
    }
  }
}

template <class F>
void for_each_case(const F& f) {
  constexpr DType kNone = DType::kOther;
  for (const DType param : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (const DType grad : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      for (const DType exp_avg : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kInt8}) {
        for (const DType exp_avg_sq : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kUInt8}) {
          for (const DType master_low : {kNone, DType::kInt16, DType::kUInt8}) {
            const bool wide = param == DType::kFloat64;
            if (wide != (grad == DType::kFloat64) || wide != (exp_avg == DType::kFloat64) ||
                wide != (exp_avg_sq == DType::kFloat64) ||
                (master_low != kNone && param != DType::kBFloat16) ||
                (grad != param && (grad != DType::kFloat32 || master_low != kNone))) {
              continue;
            }
            for (int options = 0; options < 24; ++options) {
              Case c = {param, grad, exp_avg, exp_avg_sq, master_low};
              c.by_chance = (options & 1) != 0;
              c.amsgrad = (options & 2) != 0;
              c.special = (options & 4) != 0;
              c.averaged = options >= 8;
              c.narrow_average = options >= 16;
              if (!wide || !(c.by_chance || c.narrow_average)) {
                f(c);
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  const cpu::Kernels* kernels = cpu::kernels();
  printf("instruction set: %s\n", kernels->instruction_set);
  const std::vector<int64_t> sizes = {1, 5, 127, 128, 130, 511, 513, 1025};
  for_each_case([&](const Case& c) { run_case(c, sizes, 1, kernels); });
  Case low_memory = {DType::kBFloat16, DType::kBFloat16, DType::kInt8, DType::kUInt8, DType::kUInt8};
  low_memory.by_chance = true;
  run_case(low_memory, {200001, 3, 17001}, 3, kernels);
  for (const DType half : {DType::kBFloat16, DType::kFloat16}) {
    read_halves(half, kernels);
    write_halves(half, kernels);
  }
  print_rates();
}
