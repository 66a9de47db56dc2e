-- SPDX-License-Identifier: Apache-2.0
-- A guard says that it is alive, and asks whether this data set is complete.
-- KEYS: the guards by the time they were last seen; the record of the data set: its epoch, when a guard first saw it,
-- and for each guard of the last seconds whether it has given back its holds.
-- ARGV[1]: JSON {epoch, guard, seen = guards that this one knows of, given_back, fresh, longest}.
-- The answer is JSON {known, complete, guards}.

local request = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local guards, record = KEYS[1], KEYS[2]

local known = redis.call('HGET', record, 'epoch') == request.epoch
if not known then
  redis.call('DEL', record)
  redis.call('HSET', record, 'epoch', request.epoch, 'began', string.format('%.6f', now))
  -- a server that has just been started: nobody knows which guards used the one before
  if request.fresh then redis.call('HSET', record, 'missing:', '1') end
  for _, guard in ipairs(redis.call('ZRANGEBYSCORE', guards, now - GUARD_SEEN, '+inf')) do
    redis.call('HSET', record, 'missing:' .. guard, '1')
  end
end
for _, guard in ipairs(request.seen) do
  if redis.call('HEXISTS', record, 'given:' .. guard) == 0 then redis.call('HSET', record, 'missing:' .. guard, '1') end
end
if request.given_back then
  redis.call('HSET', record, 'given:' .. request.guard, '1')
  redis.call('HDEL', record, 'missing:' .. request.guard)
end
redis.call('ZADD', guards, now, request.guard)
redis.call('ZREMRANGEBYSCORE', guards, '-inf', now - GUARD_SEEN)

local complete = now - tonumber(redis.call('HGET', record, 'began')) >= request.longest
if not complete then
  complete = request.given_back
  for _, name in ipairs(redis.call('HKEYS', record)) do
    if string.sub(name, 1, 8) == 'missing:' then complete = false end
  end
end
return cjson.encode({known, complete, redis.call('ZRANGE', guards, 0, -1)})
