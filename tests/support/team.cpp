// Samples made by a team of threads: argv[1] of them, whose members begin as argv[2] says. Ends with 1, and says why,
// if a pass comes too early, twice or not at all.
#include "binding/team.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kFirst = 3, kEnd = 203;  // samples

struct Made {
  int firsts = 0, seconds = 0;  // plain numbers: the team has to order who writes and reads them
  std::thread::id by;
};

int wrong = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  ++wrong;
}

}  // namespace

int main(int, char** argv) {
  const int members = std::atoi(argv[1]);
  const bool one_by_one = std::strcmp(argv[2], "one by one") == 0, late = std::strcmp(argv[2], "late") == 0;
  fastguide::Teams teams(members, kEnd);
  std::vector<std::vector<Made>> made(kEnd, std::vector<Made>(size_t(members)));
  std::vector<int> joins(kEnd);
  const auto work = [&](int member) {
    if (late) std::this_thread::sleep_for(std::chrono::microseconds(200 * member));
    teams.work(
        member, kFirst, kEnd,
        [&](int64_t sample, int portion) {
          Made& own = made[size_t(sample)][size_t(portion)];
          ++own.firsts;
          own.by = std::this_thread::get_id();
        },
        [&](int64_t sample) {
          for (const Made& each : made[size_t(sample)]) expect(each.firsts == 1, "a join before a first pass");
          ++joins[size_t(sample)];
        },
        [&](int64_t sample, int portion) {
          Made& own = made[size_t(sample)][size_t(portion)];
          expect(joins[size_t(sample)] == 1, "a second pass before the join");
          expect(own.by == std::this_thread::get_id(), "a second pass by another thread");
          ++own.seconds;
        });
  };
  std::vector<std::thread> threads;
  for (int member = 0; member < members; ++member) {
    if (one_by_one) {
      work(member);
    } else {
      threads.emplace_back(work, member);
    }
  }
  for (std::thread& each : threads) each.join();
  for (int64_t sample = 0; sample < kEnd; ++sample) {
    const int times = sample < kFirst ? 0 : 1;
    expect(joins[size_t(sample)] == times, "not one join");
    for (const Made& each : made[size_t(sample)]) {
      expect(each.firsts == times && each.seconds == times, "not one first and one second pass");
    }
  }
  return wrong == 0 ? 0 : 1;
}
