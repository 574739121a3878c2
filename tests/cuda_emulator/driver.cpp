// Runs the launches of a script, so that one process serves many.
//
//   driver SCRIPT INPUT OUTPUT
//
// A line of SCRIPT is a verb and name=value pairs. A pointer that isn't named is null. The driver
// allocates the workspace, of the size that the plan names.
//
// clang-format off
//   buffer name=x bytes=64 at=128 shift=2    64 bytes from byte 128 of INPUT, or NaN without `at`;
//                                            `shift` bytes past a multiple of 16
//   layer type=0 x=x W1=w ... M=3 ... kernel=1 split=1 programs=4 alive=4 seed=1
//   member type=0 x=x ... y=y y_at=64 y_stride=96   one that waits for the next `group`
//   group split=1 programs=4 M=3 seed=1      all members in one launch; split -1: the plan's own
//   adapter_gradients type=0 x=x ... split=2 kernel or split -1: the plan's own, for processors=4 arch=90
//   quantized type=0 bits=4 x=x codes=c ... processors=4   a quantised matrix's product
//   toy which=mma_bf16 in=a out=b blocks=1   one of toys.h, 32 threads a block
//   round type=0 in=a out=b                  floats to numbers of a type
//   write name=y                             a buffer to OUTPUT
//   drop                                     all buffers
// clang-format on
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "call.h"
#include "primitives.h"
#include "toys.h"

namespace {

using namespace hylora;

using Values = std::map<std::string, std::string>;

// A buffer of its exact size on the heap, so that AddressSanitizer sees accesses past its end.
class Buffer {
 public:
  Buffer(size_t bytes, int fill, size_t shift = 0) : bytes_(bytes) {
    if (posix_memalign(&base_, 128, bytes + shift + !(bytes + shift))) abort();
    data = static_cast<unsigned char*>(base_) + shift;
    memset(base_, fill, bytes + shift);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(base_); }
  size_t size() const { return bytes_; }
  unsigned char* data;

 private:
  void* base_;
  size_t bytes_;
};

std::map<std::string, Buffer> buffers;

int64_t integer(const Values& v, const char* name, int64_t otherwise = 0) {
  const auto found = v.find(name);
  return found == v.end() ? otherwise : std::stoll(found->second);
}

template <class To = void>
To* pointer(const Values& v, const char* name) {
  const auto found = v.find(name);
  return found == v.end() ? nullptr : reinterpret_cast<To*>(buffers.at(found->second).data);
}

float alpha_of(const Values& v) { return v.count("alpha") ? std::stof(v.at("alpha")) : 1.0f; }

template <class Call>
void take_workspace(Call& call, const cuda::Plan&, void*& its_h, void* h, float* partial,
                    int32_t* counters) {
  its_h = h, call.partial = partial, call.counters = counters;
}

void take_workspace(cuda::GroupCall& call, const cuda::Plan& plan, void*&, void* h, float* partial,
                    int32_t* counters) {
  complete(call, plan, h, partial, counters);
}

// Allocates the workspace, launches, and prints the outcome.
template <class Call>
void launch(const Values& v, Call& call, const cuda::Plan& plan, void*& h) {
  emulation::next_order = {uint64_t(integer(v, "seed")), int(integer(v, "alive", plan.programs))};
  Buffer workspace(size_t(integer(v, "M") * plan.h_columns * 2), 0xFF);
  Buffer partial(size_t(plan.partial_floats * 4), 0xFF), counters(size_t(plan.counters * 4), 0);
  auto* counts = reinterpret_cast<int32_t*>(counters.data);
  take_workspace(call, plan, h, workspace.data, reinterpret_cast<float*>(partial.data), counts);
  const auto begin = std::chrono::steady_clock::now();
  const char* error = cuda::launch(call, plan, nullptr);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  int64_t left = 0;
  for (int64_t i = 0; i < plan.counters; i++)
    left += counts[i] != 0;
  printf("kernel=%d split=%d programs=%lld order=%llx seconds=%.4f left=%lld error=%s\n",
         plan.kernel, plan.split, (long long)plan.programs,
         (unsigned long long)emulation::last_hash, took.count(), (long long)left, error);
  fflush(stdout);
}

cuda::LayerCall layer_call(const Values& v) {
  cuda::LayerCall d{};
  d.type = cuda::Type(integer(v, "type")), d.transposed = integer(v, "transposed");
  d.x = pointer(v, "x"), d.W1 = pointer(v, "W1"), d.W1a = pointer(v, "W1a");
  d.W2 = pointer(v, "W2"), d.W2a = pointer(v, "W2a"), d.bias = pointer(v, "bias");
  d.y = pointer<char>(v, "y") + integer(v, "y_at"), d.h_a = pointer(v, "h_a");
  d.pivots = pointer<int32_t>(v, "pivots"), d.others = pointer<int64_t>(v, "others");
  d.M = integer(v, "M"), d.K = integer(v, "K"), d.N = integer(v, "N"), d.rank = integer(v, "rank");
  d.lora_rank = integer(v, "lora_rank"), d.others_count = integer(v, "others_count");
  d.x_stride = integer(v, "x_stride");
  d.w1_stride = integer(v, "w1_stride"), d.w1a_stride = integer(v, "w1a_stride");
  d.w2_stride = integer(v, "w2_stride"), d.w2a_stride = integer(v, "w2a_stride");
  d.alpha = alpha_of(v), d.y_stride = integer(v, "y_stride", d.N);
  return d;
}

void layer(const Values& v) {
  cuda::LayerCall d = layer_call(v);
  const int64_t kernel = integer(v, "kernel", -1);
  const cuda::Plan plan =
      kernel < 0 ? cuda::plan(d, int(integer(v, "processors", 4)), int(integer(v, "arch", 90)))
                 : cuda::plan_as(d, cuda::Kernel(kernel), int(integer(v, "split", 1)),
                                 integer(v, "programs", 1));
  launch(v, d, plan, d.h);
}

cuda::GroupCall waiting{};  // the members of the next group

void group(const Values& v) {
  const int64_t split = integer(v, "split", -1);
  void* none;
  launch(v, waiting,
         split < 0 ? cuda::plan(waiting, int(integer(v, "processors", 4)), 90)
                   : cuda::plan_as(waiting, int(split), integer(v, "programs", 1)),
         none);
  waiting.count = 0;
}

void adapter_gradients(const Values& v) {
  cuda::AdapterGradientsCall t{};
  t.type = cuda::Type(integer(v, "type"));
  t.dh_a = pointer(v, "dh_a"), t.x = pointer(v, "x");
  t.h_a = pointer(v, "h_a"), t.dy = pointer(v, "dy");
  t.dA = pointer(v, "dA"), t.dB = pointer(v, "dB"), t.db = pointer(v, "db");
  t.M = integer(v, "M"), t.K = integer(v, "K"), t.N = integer(v, "N");
  t.lora_rank = integer(v, "lora_rank");
  t.x_stride = integer(v, "x_stride"), t.dy_stride = integer(v, "dy_stride");
  t.alpha = alpha_of(v);
  const int64_t split = integer(v, "split", -1);
  void* none;
  launch(v, t,
         split < 0 ? cuda::plan(t, int(integer(v, "processors", 4)), int(integer(v, "arch", 90)))
                   : cuda::plan_as(t, int(split)),
         none);
}

void quantized(const Values& v) {
  cuda::QuantizedCall d{};
  d.type = cuda::Type(integer(v, "type")), d.bits = int(integer(v, "bits"));
  d.x = pointer(v, "x"), d.codes = pointer(v, "codes"), d.scales = pointer(v, "scales");
  d.zeros = pointer(v, "zeros"), d.bias = pointer(v, "bias"), d.y = pointer(v, "y");
  d.h_a = pointer(v, "h_a"), d.B = pointer(v, "B");
  d.M = integer(v, "M"), d.K = integer(v, "K"), d.N = integer(v, "N");
  d.groups = (d.K + 63) / 64, d.lora_rank = integer(v, "lora_rank"), d.x_stride = d.K;
  emulation::next_order = {uint64_t(integer(v, "seed")), 8};
  const char* error = cuda::launch(d, int(integer(v, "processors", 4)), nullptr);
  printf("kernel=-1 split=1 programs=0 order=%llx seconds=0 left=0 error=%s\n",
         (unsigned long long)emulation::last_hash, error);
  fflush(stdout);
}

void toy(const Values& v) {
  const int blocks = int(integer(v, "blocks", 1));
  Buffer counters(4, 0);
  emulation::next_order = {uint64_t(integer(v, "seed")), blocks};
  const cuda::Toy call{pointer<uint32_t>(v, "in"), pointer<uint32_t>(v, "out"),
                       reinterpret_cast<int32_t*>(counters.data)};
  for (const auto& [name, kernel] : cuda::kToys)
    if (v.at("which") == name) cuda::run(kernel, blocks, 32, 512, nullptr, call);
}

void round_numbers(const Values& v) {
  const float* in = pointer<float>(v, "in");
  auto* out = pointer<uint16_t>(v, "out");
  const bool is_bf16 = integer(v, "type") == 0;
  for (size_t i = 0; i < buffers.at(v.at("in")).size() / 4; i++)
    out[i] =
        is_bf16 ? cuda::rounded<cuda::bf16>(in[i]).bits : cuda::rounded<cuda::fp16>(in[i]).bits;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return fprintf(stderr, "driver SCRIPT INPUT OUTPUT\n"), 2;
  std::ifstream script(arguments[1]), input(arguments[2], std::ios::binary);
  std::ofstream output(arguments[3], std::ios::binary);
  for (std::string line; std::getline(script, line);) {
    std::istringstream words(line);
    std::string verb;
    words >> verb;
    Values v;
    for (std::string word; words >> word;)
      v[word.substr(0, word.find('='))] = word.substr(word.find('=') + 1);
    if (verb == "buffer") {
      const int64_t at = integer(v, "at", -1), bytes = integer(v, "bytes");
      Buffer& buffer =
          buffers.try_emplace(v.at("name"), size_t(bytes), 0xFF, size_t(integer(v, "shift")))
              .first->second;
      if (at >= 0) {
        input.seekg(at);
        input.read(reinterpret_cast<char*>(buffer.data), bytes);
      }
    } else if (verb == "layer") {
      layer(v);
    } else if (verb == "member") {
      waiting.members[waiting.count++] = layer_call(v);
    } else if (verb == "group") {
      group(v);
    } else if (verb == "adapter_gradients") {
      adapter_gradients(v);
    } else if (verb == "quantized") {
      quantized(v);
    } else if (verb == "toy") {
      toy(v);
    } else if (verb == "round") {
      round_numbers(v);
    } else if (verb == "write") {
      const Buffer& buffer = buffers.at(v.at("name"));
      output.write(reinterpret_cast<const char*>(buffer.data), std::streamsize(buffer.size()));
    } else if (verb == "drop") {
      buffers.clear();
    }
  }
  return output.good() && input.good() ? 0 : 4;
}
