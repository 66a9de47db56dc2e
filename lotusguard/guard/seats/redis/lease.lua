-- SPDX-License-Identifier: Apache-2.0
-- Get or renew the lease of a room, or give it up. KEYS: the lease; the last token that was given out.
-- ARGV: the guard; for how many milliseconds, 0 to give it up. The answer is the token; if another guard has the lease,
-- in how many milliseconds that ends unless it is renewed, as a negative number; 0 if it was given up.

local holder = redis.call('HGET', KEYS[1], 'guard')
if holder and holder ~= ARGV[1] then return -math.max(1, redis.call('PTTL', KEYS[1])) end
if ARGV[2] == '0' then
  redis.call('DEL', KEYS[1])
  return 0
end
if not holder then
  redis.call('HSET', KEYS[1], 'guard', ARGV[1], 'token', redis.call('INCR', KEYS[2]))
end
redis.call('EXPIRE', KEYS[2], 86400)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return tonumber(redis.call('HGET', KEYS[1], 'token'))
