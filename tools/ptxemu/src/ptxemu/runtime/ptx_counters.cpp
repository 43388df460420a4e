// Counters: lane records of one instruction are grouped by how often the lane has executed it since
// the warp last converged, which pairs up the lanes of one warp-level request.
#include "ptx_internal.h"

namespace ptx {

struct Request { u64 address[32]; u32 lanes; u32 bytes; bool shared; };

// The number of passes over the 32 four-byte banks that a request needs.
static u32 wavefronts(const u64* address, u32 lanes, u32 bytes) {
  u32 group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8, total = 0;
  for (u32 first = 0; first < 32; first += group) {
    u64 words[256];
    u32 count = 0;
    for (u32 lane = first; lane < first + group; lane++)
      if (lanes >> lane & 1)
        for (u64 w = address[lane] / 4; w <= (address[lane] + bytes - 1) / 4 && count < 256; w++) words[count++] = w;
    if (!count) continue;
    std::sort(words, words + count);
    count = (u32)(std::unique(words, words + count) - words);
    u32 per_bank[32] = {}, worst = 1;
    for (u32 i = 0; i < count; i++) worst = std::max(worst, ++per_bank[words[i] % 32]);
    total += worst;
  }
  return total;
}

static u32 ideal_wavefronts(u32 lanes, u32 bytes) {
  u32 group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8, total = 0;
  for (u32 first = 0; first < 32; first += group)
    total += ((lanes >> first) & (u32)((1ull << group) - 1)) != 0;
  return total;
}

void count_shared(Fiber* t, int instr, const u64* addresses, u32 lanes, u32 bytes) {
  InstructionStats& s = t->owner->stats[instr];
  s.shared_requests++;
  s.shared_wavefronts += wavefronts(addresses, lanes, bytes);
  s.shared_ideal += ideal_wavefronts(lanes, bytes);
}

static void count_global(InstructionStats& s, const Request& r) {
  std::vector<u64> sectors;
  std::vector<std::pair<u64, u64>> spans;
  for (int lane = 0; lane < 32; lane++)
    if (r.lanes >> lane & 1) {
      for (u64 k = r.address[lane] / 32; k <= (r.address[lane] + r.bytes - 1) / 32; k++) sectors.push_back(k);
      spans.push_back({r.address[lane], r.address[lane] + r.bytes});
    }
  std::sort(sectors.begin(), sectors.end());
  std::sort(spans.begin(), spans.end());
  u64 unique_bytes = 0, reached = 0;
  for (auto& span : spans) {
    u64 from = std::max(span.first, reached);
    if (span.second > from) unique_bytes += span.second - from;
    reached = std::max(reached, span.second);
  }
  s.global_requests++;
  s.global_sectors += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
  s.global_ideal += (unique_bytes + 31) / 32;
  s.global_bytes += unique_bytes;
}

void flush_records(WarpState* w) {
  BlockState* b = nullptr;
  std::map<std::pair<s64, u32>, Request> requests;  // (instruction and space, occurrence)
  for (int lane = 0; lane < 32; lane++) {
    Fiber* t = w->lanes[lane];
    if (!t || t->records.empty()) continue;
    b = t->owner;
    std::map<s64, u32> occurrence;
    for (const MemoryRecord& m : t->records) {
      s64 key = (s64)m.instr * 2 + m.shared;
      Request& r = requests[{key, occurrence[key]++}];
      r.lanes |= 1u << lane;
      r.address[lane] = m.address;
      r.bytes = m.bytes;
      r.shared = m.shared;
    }
    t->records.clear();
  }
  for (auto& entry : requests) {
    const Request& r = entry.second;
    int instr = (int)(entry.first.first / 2);
    if (r.shared) count_shared(*std::find_if(w->lanes, w->lanes + 32, [](Fiber* f) { return f; }), instr, r.address, r.lanes, r.bytes);
    else count_global(b->stats[instr], r);
  }
}

}  // namespace ptx
