// Shares each of some samples out among a team of threads, which wait for each other once in the middle of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace fastguide {

constexpr int kMostMembers = 8;  // threads of a team: how many may wait for the last one

// Makes samples in two passes over their portions, one for each member, with something in between that needs the first
// pass over all of them. Who makes the first pass over a portion also makes the second, as it is in that thread's
// caches.
//
// A member who is done takes on a portion that another has not begun, and waits only for what somebody is at work on.
// So members may begin late, or one after the other: then the first makes all samples.
class Teams {
 public:
  Teams(int members, int64_t samples) : members_(members), meetings_(static_cast<size_t>(samples)) {}

  // Does the part of one member of the team that makes the samples begin <= k < end. first(sample, portion) is called
  // once for each portion, then join(sample) by whoever was last; and then second(sample, portion) by whoever has made
  // the first pass.
  template <typename First, typename Join, typename Second>
  void work(int member, int64_t begin, int64_t end, const First& first, const Join& join, const Second& second) {
    for (int64_t sample = begin; sample < end; ++sample) {
      Meeting& meeting = meetings_[size_t(sample)];
      uint32_t own = 0;
      for (int k = 0; k < members_; ++k) {
        const int portion = (member + k) % members_;
        if (!take(portion, &meeting)) continue;
        own |= bit_of(portion);
        first(sample, portion);
        if (meeting.made.fetch_add(1, std::memory_order_acq_rel) + 1 < members_) continue;
        join(sample);
        meeting.is_joined.store(true, std::memory_order_release);
      }
      for (int64_t waited = 0; !meeting.is_joined.load(std::memory_order_acquire); ++waited) wait(waited);
      for (int portion = 0; portion < members_; ++portion) {
        if ((own & bit_of(portion)) != 0) second(sample, portion);
      }
    }
  }

 private:
  // What the team knows of a sample, on a line of its own, as all of them look at it while they wait.
  struct alignas(64) Meeting {
    std::atomic<uint32_t> taken{0};  // a bit for each portion
    std::atomic<int> made{0};        // portions whose first pass is done
    std::atomic<bool> is_joined{false};
  };

  static uint32_t bit_of(int portion) { return uint32_t{1} << portion; }

  static bool take(int portion, Meeting* meeting) {
    return (meeting->taken.fetch_or(bit_of(portion), std::memory_order_relaxed) & bit_of(portion)) == 0;
  }

  // Lets the processor rest for a moment; after some microseconds, lets it run another thread.
  static void wait(int64_t waited) {
    if (waited > 1000) {
      std::this_thread::yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  int members_;
  std::vector<Meeting> meetings_;
};

}  // namespace fastguide
