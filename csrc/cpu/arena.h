// Scratch memory of the CPU kernels.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace ctk::cpu {

constexpr int64_t ALIGNMENT = 64;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Scratch memory of one worker: a bump allocator over one aligned block. Each thread keeps its last blocks for later
// calls, up to KEPT_BYTES each, since fresh memory costs a page fault per 4 KB.
class Arena {
 public:
  static constexpr int64_t KEPT_BYTES = 16 << 20;

  Arena() = default;  // measures: take() only counts
  explicit Arena(int64_t bytes) : block_(bytes ? find(round_up(bytes, ALIGNMENT)) : Block{}) {}
  ~Arena() {
    if (block_.memory && block_.bytes <= KEPT_BYTES) spare().push_back(std::move(block_));
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  template <typename T>
  T* take(int64_t count) {
    T* p = block_.memory ? reinterpret_cast<T*>(block_.memory.get() + used_) : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), ALIGNMENT);
    return p;
  }
  int64_t used() const { return used_; }
  static void release() { spare().clear(); }  // what this thread keeps
  static int64_t bytes(int64_t count, int64_t size) { return round_up(count * size, ALIGNMENT); }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  struct Block {
    std::unique_ptr<char, Free> memory;
    int64_t bytes = 0;
  };
  static std::vector<Block>& spare() {
    thread_local std::vector<Block> blocks;
    return blocks;
  }
  static Block find(int64_t bytes) {
    std::vector<Block>& blocks = spare();
    while (!blocks.empty()) {
      Block block = std::move(blocks.back());
      blocks.pop_back();
      if (block.bytes >= bytes) return block;
    }
    Block block{std::unique_ptr<char, Free>(static_cast<char*>(std::aligned_alloc(ALIGNMENT, bytes))), bytes};
    if (!block.memory) throw std::bad_alloc();
    return block;
  }

  Block block_;
  int64_t used_ = 0;
};

}  // namespace ctk::cpu
